"""What the demo of decomposition says of its runs: means and spreads over seeds, in one unit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from theodolite.demo_decomposition import attack_spreads, build_page, in_unit, power_of_ten, summary_lines
from theodolite.functional.statistics import Spread

LOSSES = {
    "joint_64": [[2.0e-4, 3.1e-4], [2.6e-4, 3.9e-4], [2.2e-4, 3.0e-4]],
    "separate_8": [[2.1e-4, 3.6e-4], [2.9e-4, 4.4e-4], [2.3e-4, 3.5e-4]],
}
TEST = {
    "identity_ci_error/total": 0.0, "recovery/linear1/mmcs": 0.9997, "recovery/linear2/mmcs": 0.9998, "recovery/linear1/min_cosine": 0.9,
    "ci_l0_0/total": 0.4, "loss/stochastic_recon": 2e-4,
}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three finished runs, as far as the demo reads them."""
    folders = [tmp_path / f"tms_5-2-{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        (folder / "pgd").mkdir(parents=True)
        (folder / "figures" / "step_000003").mkdir(parents=True)
        for name in ("permuted_ci", "uv", "ci_histogram"):
            (folder / "figures" / "step_000003" / f"{name}.png").write_bytes(b"png")
        rows = [
            {"attack": attack, "n_steps": n, "loss": loss, "attacks": 32}
            for attack, seeds in LOSSES.items()
            for n, loss in zip((1, 20), seeds[seed], strict=True)
        ]
        (folder / "pgd" / "pgd_recon.test.step_000003.json").write_text(json.dumps({"attack_batch_size": 64, "results": rows}))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 3} | {f"test/{name}": value for name, value in TEST.items()}))
        (folder / "run.json").write_text(json.dumps({"seconds": 12.0 + seed}))
    return folders


def test_attacks_are_means_and_sample_deviations_over_seeds(runs: list[Path]) -> None:
    found = attack_spreads(runs)
    for attack, losses in LOSSES.items():
        for column, n in enumerate((1, 20)):
            values = np.array(losses)[:, column]
            item = found[attack][n]
            assert (item.n, item.mean, item.sd) == (
                3,
                pytest.approx(values.mean(), rel=1e-12),
                pytest.approx(values.std(ddof=1), rel=1e-12),
            )
    assert power_of_ten(found) == -4
    assert in_unit(found["joint_64"][1], -4) == "2.27 ± 0.31"
    assert in_unit(Spread(1, 2e-4, None), -4) == "2.00", "one seed has no spread"


def test_lines_and_page_name_unit_and_n(runs: list[Path], tmp_path: Path) -> None:
    lines = summary_lines(runs)
    assert "units of 10⁻⁴, mean ± sample standard deviation over n=3 seeds" in lines[3]
    assert lines[-1] == "separate_8      n=1: 2.43 ± 0.42   n=20: 3.83 ± 0.49"
    build_page(runs, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    recovered = ("mean ± sd, n=3", "13<small>± 1</small>", "0.9997<small>± 0</small>", "tms_5-2-0: causal importance")
    for text in (*recovered, "2.43 ± 0.42", "joint_64 32"):
        assert text in page
    assert set(json.loads((tmp_path / "report" / "summary.json").read_text())["attacks"]) == {run.name for run in runs}
    assert "one seed, so no spread" in summary_lines(runs[:1])[1]
