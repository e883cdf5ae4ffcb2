"""Which isolation is chosen, what is said about it, and what only some tiers or options do."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from theodolite.sandbox import Call, Job, Limits, Sandbox, lockdown, pool, tiers, worker

LIMITS = Limits(cpu_s=0.4, wall_s=20.0, memory_mb=128, output_kb=64)
ONE = Job("def f(): return 1", entry="f", calls=(Call(),))


def test_the_report_says_what_holds_and_is_plain_data():
    with Sandbox(limits=LIMITS) as sandbox:
        report = sandbox.report
        data = json.loads(json.dumps(report.as_dict()))
    assert data["tier"] == report.tier
    assert data["held"] == list(tiers.ATTACKS)
    assert data["broke"] == []
    assert set(data["passed_over"]) == set(tiers.CHAIN[: tiers.CHAIN.index(report.tier)])
    assert report.tier in str(report)
    with pytest.raises(RuntimeError, match="not started"):
        sandbox.report  # noqa: B018


def test_without_bubblewrap_the_next_tier_is_taken_and_the_reason_kept(monkeypatch):
    monkeypatch.setattr(tiers.shutil, "which", lambda name: None)
    with Sandbox(limits=LIMITS) as sandbox:
        assert sandbox.report.tier in ("namespaces", "seccomp")
        assert sandbox.report.passed_over["bwrap"] == "bubblewrap (bwrap) is not installed"
        assert sandbox.run([ONE])[0].outputs == (1,)


def test_without_namespaces_seccomp_alone_holds(monkeypatch):
    real = worker.Worker._command

    def refuse(self, passed):
        if self._tier in ("bwrap", "namespaces"):
            return [sys.executable, "-c", "raise OSError('namespaces are forbidden here')"]
        return real(self, passed)

    monkeypatch.setattr(worker.Worker, "_command", refuse)
    with Sandbox(limits=LIMITS) as sandbox:
        assert sandbox.report.tier == "seccomp"
        assert all("namespaces are forbidden here" in why for why in sandbox.report.passed_over.values())
        assert sandbox.report.held == tiers.ATTACKS


def test_a_tier_asked_for_by_name_is_that_one_or_nothing(monkeypatch):
    monkeypatch.setattr(tiers.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"refuses to run untrusted programs.*bwrap: bubblewrap \(bwrap\) is not installed"):
        Sandbox(tier="bwrap").start()
    with pytest.raises(ValueError, match=r"tier is 'docker'; choose one of auto, bwrap, namespaces, seccomp, unsafe"):
        Sandbox(tier="docker")  # type: ignore[arg-type]


def test_unsafe_has_to_be_asked_for_says_so_and_is_unsafe(caplog):
    assert "unsafe" not in tiers.CHAIN
    with Sandbox(limits=LIMITS, tier="unsafe") as sandbox:
        assert "asked to be unsafe" in caplog.text
        assert "open a file" in sandbox.report.broke
        loop, survivor = sandbox.run(
            [
                Job("while True: pass", invoke="1"),
                Job("import os, time\nif os.fork() == 0:\n    time.sleep(60)\ndef f(): return os.getpid()", entry="f", calls=(Call(),)),
            ]
        )
        assert loop.status == "timeout"
        assert survivor.status == "ok"
        assert sandbox.run([ONE])[0].outputs == (1,)


@pytest.mark.skipif(lockdown.platform.machine() not in lockdown.SYSTEM_CALLS, reason="no table for this machine")
def test_programs_may_import_from_disk_only_where_asked_and_read_nothing_else():
    imports = Job("import wave\ndef f(): return wave.__name__", entry="f", calls=(Call(),))
    read = Job("def f():\n try: open('/etc/hostname').read()\n except OSError as e: return type(e).__name__", entry="f", calls=(Call(),))
    write = Job(
        "import wave\ndef f():\n try: open(wave.__file__, 'a')\n except OSError as e: return type(e).__name__", entry="f", calls=(Call(),)
    )
    with Sandbox(limits=LIMITS) as closed:
        assert closed.run([imports])[0].status == "runtime_error"
        if not closed.report.landlock:
            with pytest.raises(RuntimeError, match="Landlock"):
                Sandbox(limits=LIMITS, stdlib_files=True).start()
            return
    with Sandbox(limits=LIMITS, stdlib_files=True) as opened:
        outcomes = opened.run([imports, read, write])
        assert [o.outputs for o in outcomes[:1]] == [("wave",)]
        assert outcomes[1].outputs in (("PermissionError",), ("FileNotFoundError",))
        assert outcomes[2].outputs == (("PermissionError",))
        assert opened.report.reading
        assert "look at a file" not in opened.report.held


def test_a_batch_ends_at_its_deadline_with_what_it_has_and_the_next_is_unaffected():
    with Sandbox(workers=1, limits=Limits(cpu_s=20.0, wall_s=60.0), deadline_s=1.5) as sandbox:
        started = time.monotonic()
        first, loop, last = sandbox.run([ONE, Job("while True: pass", invoke="1"), ONE])
        assert time.monotonic() - started < 15
        assert (first.status, loop.status, last.status) == ("ok", "infra_error", "infra_error")
        assert "deadline of 1.5 s" in last.error
        assert sandbox.run([ONE])[0].outputs == (1,)


def test_several_workers_stay_on_a_core_each_and_ranks_do_not_share(monkeypatch):
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pool._cores(2) == [0, 1]
    assert pool._cores(1) == [None]
    assert pool._cores(5) == [None] * 5
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pool._cores(2) == [2, 3]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pool._cores(2) == [None, None]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_pinned_workers_run_their_programs_on_their_own_core():
    where = Job("import os\ndef f(): return sorted(os.sched_getaffinity(0))", entry="f", calls=(Call(),))
    with Sandbox(workers=2, limits=LIMITS) as sandbox:
        seen = {tuple(o.outputs[0]) for o in sandbox.run([where] * 40) if o.outputs}
    assert seen <= {(core,) for core in os.sched_getaffinity(0)}
    assert len(seen) == 2


@pytest.mark.parametrize("tier", tiers.CHAIN)
@pytest.mark.parametrize("victim", ["first", "last"])
def test_whatever_process_of_a_worker_is_killed_the_batch_completes(tier, victim):
    try:
        sandbox = Sandbox(workers=2, limits=LIMITS, tier=tier)
        sandbox.start()
    except RuntimeError as error:
        pytest.skip(str(error))
    with sandbox:
        leader = sandbox.worker_pids[0]
        members = sorted(
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and (entry / "stat").exists() and os.getsid(int(entry.name)) == leader
        )
        jobs = [Job(f"def f(): return {i} + 0 * sum(range(10**6))", entry="f", calls=(Call(),)) for i in range(30)]
        killer = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import os, time; time.sleep(0.1); os.kill({members[0 if victim == 'first' else -1]}, {int(signal.SIGKILL)})",
            ]
        )
        outcomes = sandbox.run(jobs)
        killer.wait(60)
        assert [o.outputs for o in outcomes] == [(i,) for i in range(30)]
        assert sandbox.run([ONE])[0].outputs == (1,)


# -- system-call tables ----------------------------------------------------------------------------------------------------------------

GENERIC = Path("/usr/include/asm-generic/unistd.h")


@pytest.mark.skipif(not GENERIC.exists(), reason="the kernel's headers are not installed")
def test_the_table_for_aarch64_is_the_kernels_generic_one():
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", GENERIC.read_text())}
    table = lockdown.SYSTEM_CALLS["aarch64"][1] | lockdown._READING["aarch64"]
    aliases = {"newfstatat": "fstatat"}
    assert {name: numbers.get(aliases.get(name, name), numbers.get(name)) for name in table} == table


@pytest.mark.skipif(
    lockdown.platform.machine() != "x86_64" or not Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").exists(), reason="no headers"
)
def test_the_table_for_x86_64_is_the_kernels():
    text = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    table = lockdown.SYSTEM_CALLS["x86_64"][1] | lockdown._READING["x86_64"]
    assert {name: numbers[name] for name in table} == table


def run_filter(program: bytes, number: int, arch: int, arguments: tuple[int, ...] = (0,) * 6) -> int:
    """An interpreter of classic BPF for the five instructions that the filter uses, written from the kernel's documentation."""
    import struct

    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments)
    steps = [struct.unpack_from("=HBBI", program, 8 * i) for i in range(len(program) // 8)]
    accumulator, at = 0, 0
    while True:
        code, true, false, value = steps[at]
        if code == 0x20:
            accumulator, at = struct.unpack_from("=I", data, value)[0], at + 1
        elif code == 0x06:
            return value
        else:
            held = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += 1 + (true if held else false)


@pytest.mark.parametrize("reading", [False, True])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_allows_its_table_and_nothing_else(machine, reading):
    arch, table = lockdown.SYSTEM_CALLS[machine]
    program = lockdown.filter_program(machine, reading)
    allow, eperm = 0x7FFF0000, 0x00050001
    listed = {number: name for name, number in table.items()} | (
        {number: name for name, number in lockdown._READING[machine].items()} if reading else {}
    )
    for number in range(600):
        verdict = run_filter(program, number, arch)
        name = listed.get(number)
        if name is None or name == "fcntl":
            assert verdict == eperm, (number, name)
        elif name in ("nanosleep", "clock_nanosleep"):
            assert verdict == 0x00050000
        else:
            assert verdict == allow, (number, name)
    assert [run_filter(program, table["fcntl"], arch, (0, command, 0, 0, 0, 0)) for command in (1, 3, 8, 10, 0)] == [
        allow,
        allow,
        *[eperm] * 3,
    ]
    assert run_filter(program, table["read"], 0x40000003) == 0x80000000
    if machine == "x86_64":
        assert run_filter(program, 0x40000000 | table["read"], arch) == 0x80000000
    if reading:
        number = lockdown._READING[machine]["openat"]
        flags = (os.O_RDONLY, os.O_RDONLY | os.O_CLOEXEC, os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)
        assert [run_filter(program, number, arch, (0, 0, f, 0, 0, 0)) for f in flags] == [allow, allow, *[eperm] * 4]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_kills_every_call_by_another_machines_numbers_and_allows_none_by_an_alias(machine):
    arch, program = lockdown.SYSTEM_CALLS[machine][0], lockdown.filter_program(machine)
    kill, eperm = 0x80000000, 0x00050001
    i386, arm, nothing, x32 = 0x40000003, 0x40000028, 0, 0x40000000
    others = {i386, arm, nothing, *(known for known, _ in lockdown.SYSTEM_CALLS.values())} - {arch}
    for number in range(600):
        assert {run_filter(program, number, other) for other in others} == {kill}
        for alias in (x32, 1 << 31, 3 << 30):  # a bit that some kernels mask off
            assert run_filter(program, alias | number, arch) == (kill if machine == "x86_64" else eperm)


def test_the_zygotes_files_import_the_standard_library_only():
    for name in ("zygote", "runner", "codec", "lockdown", "landlock", "namespaces", "memory"):
        tree = ast.parse((Path(worker._SCRIPT).parent / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
                assert all(module.split(".")[0] in sys.stdlib_module_names | {"__future__"} for module in modules), (name, modules)
                assert not isinstance(node, ast.ImportFrom) or node.level == 0
