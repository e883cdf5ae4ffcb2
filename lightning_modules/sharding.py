"""Weights in shards over ranks (FSDP2): whole while a window is sampled and scored, in shards while its update is computed.

Under FSDP2 every pass through a sharded layer is a collective: all ranks must make it. Ranks decode different numbers of tokens, so
nothing but the gradient's passes is done in shards. Before a window, and before an evaluation, every rank gathers all weights once;
meanwhile no pass is a collective, and ranks may be as uneven as they like. Then the shards are all that is left, and gradients are computed

* layer by layer: all ranks make as many passes, each of which gathers a layer, uses it and reduces its gradient to shards; or
* with the weights gathered once more for the whole gradient, where a path needs layers in no particular order (``split_backward``).

Either way ``p.grad`` ends as a shard of the *sum* over ranks, and the optimizer holds moments of its shards only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn, zeros_like
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from theodolite.distributed import sum_gradients
from theodolite.sharded_memory import decoder_layers


class ShardedModel:
    """A model whose every decoder layer, and the rest of it, lie in shards over the ranks of a mesh.

    Args:
        model: Any model, the same on every rank; its parameters become shards in place.
        mesh: One-dimensional.

    Attributes:
        model: The same module.
        is_whole: Whether all weights are gathered on every rank at the moment.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.model, self.is_whole = model, False
        layers = decoder_layers(model)
        for part in (*layers, model):
            fully_shard(part, mesh=mesh)
        self._parts: list[FSDPModule] = [cast(FSDPModule, part) for part in (model, *layers)]
        # who comes next in the backward pass is said, not learnt from earlier passes: those differ over ranks, and with them collectives
        last_first = [self._parts[-1], *self._parts[1:2], *self._parts[1:-1]]
        for part, following in zip(self._parts, last_first, strict=True):
            part.set_modules_to_backward_prefetch([following])
            part.set_gradient_divide_factor(1.0)  # denominators are global already: what is wanted is the sum
            part.set_force_sum_reduction_for_comms(True)

    def gather(self) -> None:
        """All weights on every rank, and no collective in any pass until :meth:`release`. All ranks must call it."""
        if self.is_whole:
            return
        for part in self._parts:
            part.unshard()
        self._keep_as_they_are(True)
        self.is_whole = True

    def release(self) -> None:
        """Only this rank's shards."""
        if self.is_whole:
            for part in self._parts:
                part.reshard()
            self._keep_as_they_are(False)
            self.is_whole = False

    def _keep_as_they_are(self, whole: bool) -> None:
        for part in self._parts:
            # the root is where a backward pass begins: freed after the forward pass it would be gathered again at once
            part.set_reshard_after_forward(not whole and part is not self._parts[0], recurse=False)
            part.set_reshard_after_backward(not whole, recurse=False)
            part.set_requires_gradient_sync(not whole, recurse=False)

    def trained(self) -> list[nn.Parameter]:
        """Parameters that are optimised, in the model's order: shards, or whole ones while they are gathered."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @contextmanager
    def summed_gradients(self, whole: bool) -> Iterator[None]:
        """Backward passes inside; afterwards ``p.grad`` of every trained shard is its part of the sum over ranks. All ranks must call it.

        Args:
            whole: Gather the weights for all of it: ranks may make any passes. Otherwise passes go layer by layer, and all ranks must make
                the same number of them.
        """
        if not whole:
            self.release()
            yield
            for shard in self.trained():
                shard.grad = zeros_like(shard) if shard.grad is None else shard.grad
            return
        self.gather()
        yield
        parameters = self.trained()
        sum_gradients(parameters)
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        self.release()
        for shard, gradient in zip(self.trained(), gradients, strict=True):
            placed = cast(DTensor, shard)
            # every rank has the whole sum, so nothing is sent; a copy, or the shard would hold on to all of it
            shard.grad = distribute_tensor(gradient, placed.device_mesh, placed.placements, src_data_rank=None).clone()

    def whole_state(self, trained_only: bool) -> dict[str, Tensor]:
        """Whole tensors by name, on the CPU; tied ones once as one tensor. All ranks must call it.

        Args:
            trained_only: Only parameters that are optimised.
        """
        self.release()
        found: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if value.requires_grad or not trained_only:
                if id(value) not in found:
                    found[id(value)] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
                state[name] = found[id(value)]
        return state
