"""FVU against NumPy in float64, torchmetrics, and itself split in every way."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.regression import R2Score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from warm_processes import run_ranks

from theodolite.functional.fvu import fraction_of_variance_unexplained, median_token_fvu
from theodolite.functional.row_sample import sample_keys
from theodolite.metrics import FractionOfVarianceUnexplained
from theodolite.metrics.counted_fvu import CountedFvu


def rows(n: int = 200, d: int = 7, offset: float = 0.0, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Targets of unequal spread around ``offset`` standard deviations, and a reconstruction with an error of 0.3."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-0.5, 0.5, d, dtype=torch.float64)
    target = (torch.randn(n, d, generator=generator, dtype=torch.float64) + offset) * spread * scale
    return target, target + 0.3 * scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def reference(target: Tensor, reconstruction: Tensor) -> float:
    y, prediction = target.double().numpy().astype(np.longdouble), reconstruction.double().numpy().astype(np.longdouble)
    return float(((y - prediction) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fvu_is_the_ratio_of_numpys_float64_sums(offset: float, scale: float, dtype: torch.dtype) -> None:
    target, reconstruction = (part.to(dtype) for part in rows(offset=offset, scale=scale))
    value = fraction_of_variance_unexplained(target, reconstruction)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(reference(target, reconstruction), rel=1e-10)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_fvu_is_one_minus_variance_weighted_r2(offset: float) -> None:
    target, reconstruction = rows(offset=offset)
    r2 = R2Score(multioutput="variance_weighted").set_dtype(torch.float64)
    metric = FractionOfVarianceUnexplained()
    for part in range(0, 200, 40):
        r2.update(reconstruction[part : part + 40], target[part : part + 40])
        metric.update(target[part : part + 40], reconstruction[part : part + 40])
    assert float(metric.compute()) == pytest.approx(1 - float(r2.compute()), rel=1e-10)


def test_perfect_is_zero_and_the_mean_is_exactly_one() -> None:
    target, _ = rows(offset=5.0)
    assert float(fraction_of_variance_unexplained(target, target)) == 0.0
    assert float(fraction_of_variance_unexplained(target, target.mean(0).expand_as(target))) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("splits", [[200], [1] * 200, [3, 1, 96, 100], [0, 200], [57, 143]])
def test_batches_of_any_size_give_the_whole_set_at_an_offset_of_1000(splits: list[int]) -> None:
    target, reconstruction = (part.float() for part in rows(offset=1000.0))
    metric = FractionOfVarianceUnexplained()
    for y, prediction in zip(target.split(splits), reconstruction.split(splits), strict=True):
        metric.update(y, prediction)
    assert float(metric.compute()) == pytest.approx(reference(target, reconstruction), rel=1e-10)
    assert float(metric.median()) == pytest.approx(numpy_median(target, reconstruction), rel=1e-10)


@pytest.mark.parametrize("sizes", [[200], [100, 100], [5, 150, 45], [199, 0, 1]])
def test_three_unequal_ranks_are_one(sizes: list[int]) -> None:
    target, reconstruction = (part.float() for part in rows(offset=500.0))
    ranks = []
    for y, prediction in zip(target.split(sizes), reconstruction.split(sizes), strict=True):
        ranks.append(FractionOfVarianceUnexplained())
        if len(y):
            ranks[-1].update(y, prediction)
    whole = FractionOfVarianceUnexplained()
    for rank in ranks:
        whole.merge_state(rank)
    assert float(whole.compute()) == pytest.approx(reference(target, reconstruction), rel=1e-10)
    assert whole.rows() == 200


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8 / 3, 1e-30])
@pytest.mark.parametrize("batches", [1, 7])
def test_a_constant_target_has_no_fvu(value: float, batches: int) -> None:
    metric = FractionOfVarianceUnexplained()
    for _ in range(batches):
        metric.update(torch.full((50, 3), value, dtype=torch.float64), torch.zeros(50, 3))
    assert torch.isnan(metric.compute())
    assert torch.isnan(metric.per_dimension()).all()


def test_one_row_and_no_row_have_no_fvu_and_many_batches_of_one_row_do() -> None:
    target, reconstruction = rows(n=6)
    assert torch.isnan(fraction_of_variance_unexplained(target[:1], reconstruction[:1]))
    metric = FractionOfVarianceUnexplained()
    for y, prediction in zip(target, reconstruction, strict=True):
        metric.update(y[None], prediction[None])
    assert float(metric.compute()) == pytest.approx(reference(target, reconstruction), rel=1e-10)
    metric.reset()
    metric.update(target[:0], reconstruction[:0])
    assert torch.isnan(metric.compute())


def test_infinite_activations_are_not_averaged_away() -> None:
    target, reconstruction = rows()
    target[3, 2] = torch.inf
    assert torch.isnan(fraction_of_variance_unexplained(target, reconstruction))


def test_groups_are_the_same_ratio_one_by_one() -> None:
    target, _ = rows()
    generator = torch.Generator().manual_seed(1)
    errors = torch.randn(200, 3, 7, generator=generator, dtype=torch.float64) * torch.tensor([0.9, 0.5, 0.1])[:, None]
    metric = FractionOfVarianceUnexplained(groups=[16, 32, "all"])
    for part in range(0, 200, 50):
        metric.update(target[part : part + 50], (target[:, None] + errors)[part : part + 50])
    values = metric.compute()
    expected = [reference(target, target + errors[:, g]) for g in range(3)]
    assert [float(values[f"fvu_{name}"]) for name in ("16", "32", "all")] == pytest.approx(expected, rel=1e-10)
    assert float(values["fvu"]) == float(values["fvu_min"]) == pytest.approx(expected[2])
    assert float(values["fvu_max"]) == pytest.approx(expected[0])
    assert float(values["fvu_mean"]) == pytest.approx(sum(expected) / 3)
    medians = [numpy_median(target, target + errors[:, g]) for g in range(3)]
    assert metric.median().tolist() == pytest.approx(medians)
    assert fraction_of_variance_unexplained(target, target[:, None] + errors).tolist() == pytest.approx(expected, rel=1e-10)


def test_the_views_by_dimension_and_position_are_the_parts_of_the_whole() -> None:
    target, reconstruction = (part.float().view(20, 10, 7) for part in rows(offset=10.0))
    position = torch.arange(10).expand(20, 10)
    target = target + position[..., None]
    reconstruction = reconstruction + position[..., None]
    mask = position != 0
    metric = FractionOfVarianceUnexplained(positions=5)
    for part in range(0, 20, 6):
        batch = slice(part, part + 6)
        metric.update(target[batch], reconstruction[batch], mask[batch], position[batch])
    kept, predicted = target[mask].double().numpy(), reconstruction[mask].double().numpy()
    error, distance = (kept - predicted) ** 2, (kept - kept.mean(0)) ** 2
    assert metric.per_dimension().tolist() == pytest.approx((error.sum(0) / distance.sum(0)).tolist(), rel=1e-10)
    bucket = np.minimum(position[mask].numpy(), 4)
    by_position = [error[bucket == p].sum() / distance[bucket == p].sum() for p in range(1, 5)]
    assert torch.isnan(metric.per_position()[0])
    assert metric.per_position()[1:].tolist() == pytest.approx(by_position, rel=1e-10)
    assert float(metric.compute()) == pytest.approx(error.sum() / distance.sum(), rel=1e-10)
    assert metric.rows() == 180


def numpy_median(target: Tensor, reconstruction: Tensor) -> float:
    y, prediction = target.double().numpy(), reconstruction.double().numpy()
    return float(np.median(((y - prediction) ** 2).sum(1) / ((y - y.mean(0)) ** 2).sum(1)))


def test_a_few_huge_rows_hide_the_error_from_the_ratio_and_not_from_the_median() -> None:
    target, reconstruction = rows()
    spiked, predicted = target.clone(), reconstruction.clone()
    spiked[::50] += 1000.0
    predicted[::50] += 1000.0
    assert float(fraction_of_variance_unexplained(spiked, predicted)) < 1e-3
    assert float(median_token_fvu(spiked, predicted)) == pytest.approx(numpy_median(spiked, predicted))
    assert float(median_token_fvu(spiked, predicted, mean=target.mean(0))) > 0.01


def test_the_median_of_a_sample_is_near_that_of_all_rows_and_does_not_depend_on_batches() -> None:
    target, reconstruction = rows(n=20000, d=3)
    values = []
    for size in (20000, 333):
        metric = FractionOfVarianceUnexplained(sample_size=1000)
        for y, prediction in zip(target.split(size), reconstruction.split(size), strict=True):
            metric.update(y, prediction)
        values.append(float(metric.median()))
        assert len(metric.fvu_sample_key) == 1000
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[0] == pytest.approx(numpy_median(target, reconstruction), rel=0.15)


def test_sample_keys_are_uniform_and_distinct() -> None:
    keys = sample_keys(torch.arange(200000))
    assert keys.min() >= 0
    assert len(keys.unique()) == 200000
    shares = torch.histc(keys.double() / 2**63, bins=20, min=0, max=1) / 200000
    assert float((shares - 0.05).abs().max()) < 0.003
    # the published test vector of splitmix64: seed 1234567, first output 6457827717110365317
    assert int(sample_keys(torch.tensor([1234567]))) == 6457827717110365317


def test_a_module_in_bfloat16_does_not_round_the_sums() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.metric = nn.Linear(2, 2), FractionOfVarianceUnexplained()

    target, reconstruction = rows(offset=100.0)
    holder = Holder()
    holder.metric.update(target[:100], reconstruction[:100])
    for cast in (holder.bfloat16, holder.half, lambda: holder.to(torch.bfloat16)):
        cast()
        assert holder.metric.fvu_mean.dtype == torch.float64
    holder.metric.update(target[100:], reconstruction[100:])
    assert float(holder.metric.compute()) == pytest.approx(reference(target, reconstruction), rel=1e-10)
    assert holder.layer.weight.dtype == torch.bfloat16
    holder.metric.reset()
    assert holder.metric.fvu_count.dtype == torch.float64


def test_states_survive_saving_and_forward_and_collections() -> None:
    target, reconstruction = rows()
    metric = FractionOfVarianceUnexplained()
    metric.persistent(True)
    metric.update(target[:70], reconstruction[:70])
    copy = FractionOfVarianceUnexplained()
    copy.persistent(True)
    copy.load_state_dict(metric.state_dict())
    batch = copy(target[70:], reconstruction[70:])
    assert float(batch) == pytest.approx(reference(target[70:], reconstruction[70:]), rel=1e-10)
    assert float(copy.compute()) == pytest.approx(reference(target, reconstruction), rel=1e-10)
    both = MetricCollection({"a": FractionOfVarianceUnexplained(), "b": FractionOfVarianceUnexplained(sample_size=0)})
    both.update(target, reconstruction)
    assert float(both.compute()["b"]) == pytest.approx(reference(target, reconstruction), rel=1e-10)


def test_bad_shapes_and_settings_are_refused_in_one_sentence() -> None:
    target, reconstruction = rows(n=4)
    for bad in (reconstruction[:3], reconstruction[:, :2], reconstruction[0], reconstruction[None, None]):
        with pytest.raises(ValueError, match="FVU needs a target"):
            fraction_of_variance_unexplained(target, bad)
    with pytest.raises(ValueError, match="mask"):
        fraction_of_variance_unexplained(target, reconstruction, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="group"):
        FractionOfVarianceUnexplained(groups=["a", "b"]).update(target, reconstruction)
    with pytest.raises(ValueError, match="position"):
        FractionOfVarianceUnexplained(positions=3).update(target, reconstruction)
    metric = FractionOfVarianceUnexplained()
    metric.update(target, reconstruction)
    with pytest.raises(ValueError, match="7 wide"):
        metric.update(target[:, :2], reconstruction[:, :2])
    with pytest.raises(ValueError, match="different names"):
        FractionOfVarianceUnexplained(groups=["a", "a"])
    with pytest.raises(ValueError, match="negative"):
        FractionOfVarianceUnexplained(positions=-1)


def test_fvu_is_differentiable() -> None:
    target, reconstruction = rows(n=5, d=2)
    reconstruction.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: fraction_of_variance_unexplained(target, r), (reconstruction,))


# ---------------------------------------------------------------------- real ranks


def distributed_rank(rank: int, world: int, port: str) -> None:
    """One gloo rank: rows dealt round-robin, then unequal shares; every value must equal that of all rows together."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    target, reconstruction = (part.float() for part in rows(offset=1000.0))
    groups = torch.stack([target * 0.5, reconstruction], 1)
    metric = FractionOfVarianceUnexplained(groups=["half", "full"], sample_size=50)
    for part in range(0, 200, 40):
        batch = slice(part + rank, part + 40, world)
        metric.update(target[batch], groups[batch])
    for name, value in metric.compute().items():
        expected = reference(target, groups[:, 0 if name in ("fvu_half", "fvu_max") else 1])
        if name != "fvu_mean":
            assert abs(float(value) / expected - 1) < 1e-10, (name, float(value), expected)
    ids = sample_keys(torch.arange(200)).argsort()[:50]
    centre = target.double().mean(0)
    ratio = (groups.double() - target.double()[:, None])[ids].square().sum(-1) / (target.double()[ids] - centre).square().sum(-1)[:, None]
    assert torch.allclose(metric.median(), torch.from_numpy(np.median(ratio.numpy(), axis=0)), rtol=1e-10)
    assert metric.rows() == 200
    assert int(metric.fvu_count.sum()) == 100, "the local state is back"
    for sizes in ([150, 50], [200, 0], [0, 200]):
        unequal = FractionOfVarianceUnexplained(positions=3)
        begin = sum(sizes[:rank])
        if sizes[rank]:
            mine = slice(begin, begin + sizes[rank])
            unequal.update(target[mine], reconstruction[mine], position=torch.arange(200)[mine] % 4)
        assert abs(float(unequal.compute()) / reference(target, reconstruction) - 1) < 1e-10
        assert bool(unequal.per_position().isfinite().all())
    window, resumed = CountedFvu(), CountedFvu()
    window.add(target[rank::2], reconstruction[rank::2], torch.ones(100, dtype=torch.bool))
    saved = window.joined_state()
    assert int(window.metric.fvu_count.sum()) == 100, "saving leaves the local sums as they were"
    if rank == 0:
        resumed.load(saved)
    for key, value in window.values().items():
        assert abs(float(value - resumed.values()[key])) <= 1e-10 * abs(float(value)), key
    nothing = FractionOfVarianceUnexplained()
    assert torch.isnan(nothing.compute())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_real_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    run_ranks([__file__], tmp_path)


if __name__ == "__main__":
    distributed_rank(int(os.environ["RANK"]), 2, os.environ["MASTER_PORT"])
