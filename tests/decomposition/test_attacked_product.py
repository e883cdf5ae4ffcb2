"""What an attack's products are written out to equals what autograd computes, and everything on is the target itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_decomposition import LENGTH, ROWS, tiny, tokens

from theodolite.functional.attacked_product import (
    AttackedSite,
    ConstantWeight,
    attacked_output,
    can_attack,
    constant_product,
)
from theodolite.functional.component_masks import SourceMask, mask_from_source
from theodolite.functional.pgd import initial_sources
from theodolite.lightning_modules.decomposition.attacked import attacked_masks
from theodolite.protocols import SlopedReconstruction


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


class Module:
    """A linear map of 5 numbers to 6 by 4 components, in one dtype."""

    def __init__(self, biased: bool, dtype: torch.dtype = torch.float64) -> None:
        self.read, self.write, self.weight = (drawn(*shape, seed=sum(shape)).detach().to(dtype) for shape in ((5, 4), (4, 6), (5, 6)))
        self.bias = drawn(6, seed=3).detach().to(dtype) if biased else None

    def own(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight if self.bias is None else inputs @ self.weight + self.bias

    def written_out(self, inputs: Tensor, mask: SourceMask, pack: bool = False, known: bool = False) -> Tensor:
        assert mask.whole is not None
        assert can_attack(mask, self.read, self.write, self.weight, inputs)
        site = AttackedSite(mask, self.read, self.write, self.weight, self.bias, pack)
        given = (inputs @ self.read, self.own(inputs) if site.delta else None) if known else None
        return attacked_output(inputs, mask.whole, site, self.own, given)

    def defined(self, inputs: Tensor, mask: SourceMask) -> Tensor:
        """``((x V) m) U + d x (W - V U) + bias``."""
        assert mask.whole is not None
        source = mask.whole.expand(*inputs.shape[:-1], -1)
        weight = mask.importance + (1 - mask.importance) * source[..., :4]
        left = inputs @ (self.weight - self.read @ self.write)
        delta = source[..., 4:] if source.shape[-1] == 5 else torch.zeros(())
        output = (inputs @ self.read * weight) @ self.write + delta * left
        return output if self.bias is None else output + self.bias


@pytest.mark.parametrize("leading", [(2, 3), (2, 1), (1, 3), (1, 1)])
@pytest.mark.parametrize(("delta", "biased"), [(True, False), (True, True), (False, False), (False, True)])
def test_an_attacked_output_and_its_gradients_equal_the_definition(leading: tuple[int, int], delta: bool, biased: bool) -> None:
    module, importance, weights = Module(biased), drawn(2, 3, 4, seed=1).detach(), drawn(2, 3, 6, seed=7).detach()
    leaves = [drawn(2, 3, 5, seed=4), drawn(*leading, 4 + delta, seed=5)]
    mask = mask_from_source(importance, leaves[1])
    found, expected = module.written_out(leaves[0], mask), module.defined(leaves[0], mask)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    gradients = [torch.autograd.grad((output * weights).sum(), leaves) for output in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    known = module.written_out(leaves[0].detach(), mask, known=True)
    torch.testing.assert_close(torch.autograd.grad((known * weights).sum(), leaves[1])[0], gradients[1][1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("delta", [True, False])
def test_packed_weights_give_what_the_weights_give(delta: bool) -> None:
    module, importance = Module(True, torch.float32), drawn(2, 3, 4, seed=1).detach().float()
    leaves = [drawn(2, 3, 5, seed=4).detach().float().requires_grad_(), drawn(2, 3, 4 + delta, seed=5).detach().float().requires_grad_()]
    outputs = [module.written_out(leaves[0], mask_from_source(importance, leaves[1]), pack) for pack in (True, False)]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for one, other in zip(*[torch.autograd.grad(output.square().sum(), leaves) for output in outputs], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(2, 3), (1, 1)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_everything_on_is_the_target_bit_for_bit(leading: tuple[int, int], biased: bool, pack: bool) -> None:
    module, inputs = Module(biased, torch.float32), drawn(2, 3, 5).detach().float()
    mask = mask_from_source(drawn(2, 3, 4).detach().float(), torch.ones(*leading, 5))
    assert torch.equal(module.written_out(inputs, mask, pack), module.own(inputs))


def test_what_needs_more_than_sources_or_casts_is_left_to_autograd() -> None:
    write, importance, source = drawn(4, 6), drawn(2, 3, 4, seed=1).detach(), drawn(1, 1, 5)
    assert can_attack(mask_from_source(importance, source), write)
    assert not can_attack(mask_from_source(importance.clone().requires_grad_(), source), write)
    assert not can_attack(mask_from_source(importance, source, torch.ones(2, 3, dtype=torch.bool)), write)
    assert not can_attack(mask_from_source(importance, source), write.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_attack(mask_from_source(importance, source), write)
        assert constant_product(torch.ones(2, 3), torch.ones(3, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_a_constant_product_and_its_gradient(dtype: torch.dtype, error: float) -> None:
    inputs, weight = drawn(2, 3, 5).detach().to(dtype).requires_grad_(), drawn(5, 7, seed=1).to(dtype)
    found = constant_product(inputs, weight)
    torch.testing.assert_close(found, inputs @ weight, rtol=error, atol=error)
    upstream = drawn(2, 3, 7, seed=2).detach().to(dtype)
    (gradient,) = torch.autograd.grad(found, inputs, upstream)
    torch.testing.assert_close(gradient, upstream @ weight.T, rtol=error, atol=error)
    bias = drawn(7, seed=4).detach().to(dtype)
    torch.testing.assert_close(constant_product(inputs, weight, bias), inputs @ weight + bias, rtol=error, atol=error)
    assert not constant_product(inputs.detach(), weight).requires_grad
    assert constant_product(inputs.flatten(0, 1)[:0], weight).shape == (0, 7), "a rank may have nothing routed"
    for rows in (None, 6):
        held = ConstantWeight(weight.detach(), rows).times(inputs.detach().flatten(0, -2), torch.ones(6, 7, dtype=dtype))
        torch.testing.assert_close(held.view(2, 3, 7), found.detach() + 1, rtol=error, atol=error)


def test_what_an_attack_on_one_module_keeps_does_not_reach_an_attack_on_all() -> None:
    parts = tiny(torch.float64).requires_grad_(False)
    sources = initial_sources(parts.source_channels(), (ROWS, LENGTH), "random", (0,), dtype=torch.float64)
    prepared = parts.prepare(tokens())
    alone = {"h.0.mlp.c_fc": sources["h.0.mlp.c_fc"].clone().requires_grad_()}
    torch.autograd.grad(parts.loss_sum(prepared, alone)[0], list(alone.values()))
    found, expected = (float(parts.loss_sum(each, sources)[0]) for each in (prepared, parts.prepare(tokens())))
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_slope_of_a_decomposition_is_its_loss_s() -> None:
    parts = tiny(torch.float64).requires_grad_(False)
    assert isinstance(parts, SlopedReconstruction)
    leaves = initial_sources(parts.source_channels(), (ROWS, LENGTH), "random", (0,), dtype=torch.float64)
    for leaf in leaves.values():
        leaf.requires_grad_()
    prepared = parts.prepare(tokens())
    (loss, count), (slope, same) = parts.loss_sum(prepared, leaves), parts.slope_sum(parts.prepare(tokens()), leaves)
    assert count == same
    assert torch.isfinite(loss)
    assert torch.isnan(slope)
    for one, other in zip(*(torch.autograd.grad(total, list(leaves.values())) for total in (loss, slope)), strict=True):
        assert torch.equal(one, other)


def test_an_attack_on_a_target_that_offers_its_states_makes_no_attacked_logits_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tiny(torch.float64).requires_grad_(False)
    sources = initial_sources(parts.source_channels(), (ROWS, LENGTH), "random", (0,), dtype=torch.float64)
    clean = parts.look(tokens())
    expected = parts.recon_sum(clean, attacked_masks(clean, sources, None))
    lm_head = parts.model.target.get_submodule("lm_head")
    monkeypatch.setattr(lm_head, "forward", lambda states: pytest.fail("all logits at once"))
    prepared = parts.prepare(tokens())
    assert float(parts.loss_sum(prepared, sources)[0]) == pytest.approx(float(expected), rel=1e-12)


def test_sources_that_ask_for_no_gradient_leave_nothing_behind_in_what_is_prepared() -> None:
    parts = tiny(torch.float64).requires_grad_(False)
    sources = initial_sources(parts.source_channels(), (ROWS, LENGTH), "random", (0,), dtype=torch.float64)
    prepared = parts.prepare(tokens())
    assert float(parts.loss_sum(prepared, sources)[0]) > 0
    everything = {name: torch.ones_like(source) for name, source in sources.items()}
    assert float(parts.loss_sum(prepared, everything)[0]) == 0.0
