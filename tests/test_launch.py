"""Launching: what is asked of SLURM, and the local executor end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from theodolite.launch import Command, LaunchError, Request, main, submit, unfinished_jobs

TEST = ("test", "--config", "k_sweep.yaml")


def test_part_of_a_node_is_one_process_per_gpu_and_requeued() -> None:
    asked = Request(TEST, gpus=4, time="12:00:30", partition="gpu", job_name="sweep").slurm()
    assert asked["nodes"] == 1
    assert (asked["tasks_per_node"], asked["gpus_per_node"], asked["timeout_min"]) == (4, 4, 721)
    assert (asked["name"], asked["slurm_partition"]) == ("sweep", "gpu")
    assert asked["slurm_additional_parameters"] == {"requeue": True}
    assert "slurm_exclusive" not in asked


def test_whole_nodes_are_exclusive_and_nice_jobs_nice() -> None:
    whole = Request(TEST, gpus=8, nice=100)
    assert whole.slurm()["slurm_exclusive"] is True
    assert whole.slurm()["slurm_additional_parameters"]["nice"] == 100
    two = Request(TEST, gpus=8, gpus_per_node=4)
    assert (two.nodes, two.slurm()["nodes"], two.slurm()["gpus_per_node"]) == (2, 2, 4)
    assert two.arguments()[-2:] == ["--trainer.devices=4", "--trainer.num_nodes=2"]
    assert "gpus_per_node" not in Request(TEST, gpus=0).slurm()


def test_devices_are_set_unless_the_command_names_them() -> None:
    assert Request(TEST, gpus=4).arguments() == [sys.executable, "-m", "theodolite", *TEST, "--trainer.devices=4"]
    named = (*TEST, "--trainer.devices=2")
    assert Request(named, gpus=4).arguments()[3:] == list(named)
    assert Request(TEST, gpus=0).arguments()[3:] == list(TEST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"command": ()}, "after --"),
        ({"gpus": 12}, "8 or 16 do"),
        ({"gpus": -1}, "at least 0"),
        ({"time": "90"}, "HH:MM:SS"),
        ({"time": "1:99:00"}, "HH:MM:SS"),
        ({"time": "00:00:00"}, "more than nothing"),
    ],
)
def test_requests_that_cannot_work_are_refused_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"command": TEST}
    with pytest.raises(LaunchError, match=message):
        Request(**(base | settings))


def test_without_slurm_the_error_says_what_would_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as stopped:
        main(["--gpus", "1", "--", *TEST])
    assert stopped.value.code == 2
    assert "add --direct or --executor local" in capsys.readouterr().err
    with pytest.raises(LaunchError, match="one node"):
        submit(Request(TEST, gpus=16), "local")


def test_direct_runs_here_and_ends_as_the_command_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(arguments)
        return subprocess.CompletedProcess(arguments, 3)

    monkeypatch.setattr("theodolite.launch.subprocess.run", run)
    with pytest.raises(SystemExit) as stopped:
        main(["--gpus", "2", "--direct", "--", *TEST])
    assert stopped.value.code == 3
    assert seen == [Request(TEST, gpus=2).arguments()]


def test_jobs_have_not_ended_while_squeue_names_them_and_its_silence_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unfinished_jobs("slurm", []) == {}, "nothing was submitted, so nobody needs SLURM"
    with pytest.raises(LaunchError, match="login node"):
        unfinished_jobs("slurm", ["1"])
    script.write_text("#!/bin/sh\necho '1 PENDING'\necho '2 RUNNING'\necho '9 RUNNING'\necho '4 REQUEUED'\n")
    script.chmod(0o755)
    assert unfinished_jobs("slurm", ["1", "2", "3", "4"]) == {"1": "queued", "2": "running", "4": "queued"}
    script.write_text("#!/bin/sh\necho 'controller is down' >&2\nexit 1\n")
    with pytest.raises(LaunchError, match="controller is down"):
        unfinished_jobs("slurm", ["1"])


def test_a_local_job_has_not_ended_while_its_controller_lives() -> None:
    other = subprocess.Popen(["/bin/sleep", "30"])
    named = subprocess.Popen(["/bin/sh", "-c", "read line", "submitit.local._local"], stdin=subprocess.PIPE)
    try:
        assert unfinished_jobs("local", [str(other.pid), str(named.pid), str(os.getpid())]) == {str(named.pid): "running"}
    finally:
        for process in (other, named):
            process.kill()
            process.communicate()
    assert unfinished_jobs("local", [str(named.pid)]) == {}


def test_requeued_job_runs_the_same_command_again(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    again = Command(["a", "b"], str(tmp_path)).checkpoint()
    assert isinstance(again.function, Command)
    assert (again.function.arguments, again.function.folder) == (["a", "b"], str(tmp_path))


@pytest.mark.slow
def test_local_executor_runs_the_command_and_prints_id_and_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["--gpus", "0", "--executor", "local", "--time", "00:03:00", "--wait", "--logs", str(tmp_path / "logs"), "--", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0, shown
    log = Path(next(line for line in shown.splitlines() if line.startswith("logs ")).removeprefix("logs "))
    assert "running" in log.read_text()
    assert shown.startswith("job ")
    with pytest.raises(SystemExit) as failed:
        main(["--gpus", "0", "--executor", "local", "--time", "00:03:00", "--wait", "--logs", str(tmp_path / "logs"), "--", "tset"])
    assert failed.value.code == 1
