"""The rollout browser's script: plain DOM, no library, nothing fetched. Whatever a model wrote goes through ``textContent`` only."""

SCRIPT = """
(() => {
  const data = JSON.parse(document.getElementById("rollout-data").textContent);
  const get = id => document.getElementById(id);
  const list = get("rollout-list"), count = get("rollout-count"), more = get("rollout-more");
  const search = get("rollout-search"), arm = get("rollout-arm"), label = get("rollout-label"), override = get("rollout-override");
  const place = get("rollout-place");
  const PAGE = 20;
  let shown = PAGE;
  const option = (select, value) => {
    const element = document.createElement("option"); element.value = value; element.textContent = value; select.append(element);
  };
  [...new Set(data.runs.map(run => run[0]))].forEach(name => option(arm, name));
  [...new Set(data.rows.map(row => row.label))].sort().forEach(name => option(label, name));
  [...new Set(data.rows.map(row => row.place))].sort().forEach(name => option(place, name));
  const text = (tag, content, name) => {
    const element = document.createElement(tag); element.textContent = content; if (name) element.className = name; return element;
  };
  const block = row => {
    const pre = document.createElement("pre"), marked = new Set(row.marked);
    pre.append(text("span", data.prompts[row.prompt], "prompt"));
    row.completion.split("\\n").forEach((line, index, lines) => {
      pre.append(marked.has(index) ? text("mark", line) : document.createTextNode(line));
      if (index + 1 < lines.length) pre.append("\\n");
    });
    return pre;
  };
  const card = row => {
    const run = data.runs[row.run], element = document.createElement("article");
    element.className = "card";
    element.append(text("p", run[0] + ", seed " + run[1] + ", " + row.place + " (" + row.file + "), problem " + row.problem, "small"));
    const facts = document.createElement("p");
    const reward = row.reward === null ? "not measured" : row.reward;
    facts.append(text("b", "reward " + reward + (row.passed ? " (accepted)" : " (not accepted)")));
    facts.append(text("span", " beside verdict " + row.label + (row.mechanism ? ", overrides by " + row.mechanism : "")));
    for (const [name, value] of Object.entries(row.scores)) facts.append(text("span", ", " + name.replaceAll("_", " ") + " " + value));
    element.append(facts, block(row));
    return element;
  };
  const draw = () => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    const found = data.rows.filter(row => (!arm.value || data.runs[row.run][0] === arm.value) && (!label.value || row.label === label.value)
      && (!override.checked || row.overrides) && (!place.value || row.place === place.value)
      && words.every(word => (row.completion + data.prompts[row.prompt] + " " + row.problem).toLowerCase().includes(word)));
    count.textContent = found.length + " of " + data.rows.length + " rollouts";
    list.replaceChildren(...found.slice(0, shown).map(card));
    more.hidden = found.length <= shown;
  };
  const restart = () => { shown = PAGE; draw(); };
  for (const control of [search, arm, label, place, override]) control.addEventListener("input", restart);
  more.addEventListener("click", () => { shown += PAGE; draw(); });
  draw();
})();
"""
