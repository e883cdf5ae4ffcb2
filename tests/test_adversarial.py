"""The adversarial suite: no wrong verdict, no payment, no survivor, no file, no poisoned grade, on every tier, as root and unprivileged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from theodolite.sandbox import Sandbox
from theodolite.sandbox.tiers import CHAIN

SCRIPT = Path(__file__).parent / "adversarial" / "run_attacks.py"
sys.path.insert(0, str(SCRIPT.parent))
import run_attacks  # noqa: E402  # pyright: ignore[reportMissingImports]
from programs import ATTACKS  # noqa: E402  # pyright: ignore[reportMissingImports]

NOBODY = 65534
WANTED = "loophole innocent claim forgery liar names walk state exit time memory output machine poison text"
KINDS = set(WANTED.split())


def outcome(prefix: list[str], tier: str = "auto", every: int = 1, first: int = 0) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": "/"}
    done = subprocess.run(
        [*prefix, sys.executable, str(SCRIPT), tier, str(every), str(first)], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def as_nobody() -> list[str]:
    """A prefix that becomes an unprivileged user; one that may still read the interpreter, where only root could."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv to become someone else")
    plain = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    again = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    reads = subprocess.run([*plain, sys.executable, "-c", again], capture_output=True, timeout=120).returncode == 0
    return plain if reads else [*plain, "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]


def test_the_suite_is_large_and_covers_every_class():
    assert len(ATTACKS) >= 500
    assert kinds(0, 1) == KINDS


def kinds(first: int, every: int) -> set[str]:
    """Those of every so many attacks: what runs in a fast test holds one of each."""
    return {attack.kind for attack in list(ATTACKS.values())[first::every]}


def test_no_attack_of_every_fourth_succeeds_on_this_machines_best_tier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kinds(0, 4) == KINDS
    result = run_attacks.main(every="4")  # all of them on every tier: the slow test below
    assert (result["wrong"], result["attacks"]) == ([], len(range(0, len(ATTACKS), 4)))
    assert list(tmp_path.iterdir()) == []


def test_no_attack_of_every_eighth_succeeds_for_an_unprivileged_user():
    assert kinds(1, 8) == KINDS
    result = outcome(as_nobody(), every=8, first=1)
    assert result["wrong"] == []
    assert result["uid"] == NOBODY


@pytest.mark.slow
@pytest.mark.parametrize("unprivileged", [False, True])
@pytest.mark.parametrize("tier", CHAIN)
def test_no_attack_succeeds_on_any_tier(tier, unprivileged):
    prefix = as_nobody() if unprivileged else []
    if tier == "bwrap" and (len(prefix) > 6 or shutil.which("bwrap") is None):
        pytest.skip("bubblewrap is not here, or refuses the capability by which the interpreter is read")
    try:
        with Sandbox(tier=tier):
            pass
    except RuntimeError as error:
        pytest.skip(str(error))
    result = outcome(prefix, tier)
    assert (result["wrong"], result["tier"], result["attacks"]) == ([], tier, len(ATTACKS))
