"""The stylesheet of a report page: one column that fits a phone, system fonts, light and dark as the reader prefers."""

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f5f6f8; --text: #22252a; --soft: #5f6772; --line: #dfe2e7; --link: #0b5cad;
  --good: #00704f; --bad: #b34700; --open: #5f6772; --mark: #ffe1b8; --mark-line: #d55e00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --panel: #1f2329; --text: #e6e8eb; --soft: #a0a8b3; --line: #343a42; --link: #7db8f2;
    --good: #3ecf9f; --bad: #ff9a57; --open: #a0a8b3; --mark: #55330d; --mark-line: #ff9a57; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  "Liberation Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.15; letter-spacing: -.015em; margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 3rem 0 .8rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, ul, ol { max-width: 44rem; } p { margin: .6rem 0; }
.sub { color: var(--soft); margin: 0 0 1.6rem; }
.lead { font-size: 1.1rem; }
.small, figcaption { color: var(--soft); font-size: .875rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .875em; }
code { background: var(--panel); padding: .08em .3em; border-radius: 4px; overflow-wrap: anywhere; }
.findings { list-style: none; padding: 0; margin: 1rem 0; max-width: none; }
.findings li { display: grid; grid-template-columns: 7.2rem 1fr; gap: .2rem 1rem; padding: .75rem 0; border-top: 1px solid var(--line); }
.findings li:first-child { border-top: 0; }
.findings b { display: block; font-weight: 600; }
.findings div { max-width: 46rem; }
.chip { align-self: start; justify-self: start; margin-top: .15rem; font-size: .78rem; font-weight: 600; white-space: nowrap;
  padding: .1rem .55rem;
  border: 1px solid currentColor; border-radius: 1rem; color: var(--open); }
.chip.better, .chip.as-expected { color: var(--good); } .chip.worse, .chip.unexpected { color: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; padding: 0; margin: .8rem 0; list-style: none; font-size: .875rem;
  max-width: none; }
.legend li { display: flex; align-items: center; gap: .45rem; }
.swatch { display: inline-block; width: 1.7rem; height: 0; border-top: 3px solid var(--arm); flex: none; }
.swatch.control { border-top-style: dashed; }
figure { margin: 0; } figure .panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.2rem 1.6rem; }
figure img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; margin: .8rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .5rem .65rem; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
td.text { text-align: left; white-space: normal; min-width: 12rem; } thead th.text { text-align: left; }
thead th { min-width: 4.6rem; border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tbody th { font-weight: 400; min-width: 12.5rem; max-width: 16rem; white-space: normal; }
tbody th code { white-space: nowrap; }
.arm { white-space: nowrap; } .arm .swatch { width: 1.1rem; vertical-align: middle; margin-right: .4rem; }
td small, th small { display: block; color: var(--soft); font-size: .8rem; line-height: 1.35; }
tbody th b { font-weight: 600; }
.absent { color: var(--soft); font-style: italic; }
.note { color: var(--bad); }
details { border-top: 1px solid var(--line); } details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .65rem 0; } summary .swatch { vertical-align: middle; margin: 0 .45rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; padding-bottom: 1.1rem; }
.card { background: var(--panel); border-radius: 8px; padding: .8rem .9rem; min-width: 0; }
.card p { margin: 0; } .card pre { margin: .6rem 0 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; max-height: 26rem; line-height: 1.5; }
pre .prompt { color: var(--soft); }
mark { background: var(--mark); color: inherit; box-shadow: -3px 0 0 var(--mark-line); }
.controls { display: flex; flex-wrap: wrap; gap: .5rem .8rem; align-items: center; margin: .6rem 0 1rem; }
.controls input[type=search] { flex: 1 1 14rem; min-width: 0; } .controls input, .controls select, button { font: inherit; color: inherit;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .35rem .6rem; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .4rem .9rem; align-items: center; font-size: .9rem;
  max-width: 44rem; }
.bars span:nth-child(3n) { font-variant-numeric: tabular-nums; text-align: right; }
.bar { height: .7rem; border-radius: 3px; background: var(--link); opacity: .75; min-width: 2px; }
.block { background: var(--panel); border-radius: 8px; padding: .8rem .9rem; max-height: 22rem; }
@media (max-width: 34rem) { .findings li { grid-template-columns: 1fr; } main { padding-top: 1.6rem; } tbody th { min-width: 9.1rem;
  max-width: 9.4rem; } tbody .arm, tbody th code { white-space: normal; overflow-wrap: anywhere; } table { font-size: .82rem; }
  th, td { padding: .45rem .5rem; } }
@media print { details > * { display: block; } .scroll, pre { overflow: visible; max-height: none; } }
"""
