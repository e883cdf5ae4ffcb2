"""Where an FVU callback finds its targets and reconstructions: in a step's output, at two sites of the module, or by running it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from theodolite.callbacks.sequence_gradients import without_trace
from theodolite.site_hooks import hook_point
from theodolite.sites import ActivationSite, capture_sites, parse_site


@dataclass(slots=True)
class FvuRows:
    """What one batch adds.

    Attributes:
        target: (..., d).
        reconstruction: (..., d) or (..., G, d).
        mask: (...) bool of rows that count, or None.
        position: (...) int64 token positions, or None.
    """

    target: Tensor
    reconstruction: Tensor
    mask: Tensor | None = None
    position: Tensor | None = None


class FvuSource(ABC):
    """Finds the rows of a step."""

    def watch(self, module: nn.Module) -> Any:
        """A context in which the step runs."""
        return ExitStack()

    @abstractmethod
    def rows(self, module: nn.Module, outputs: Any, batch: Any) -> FvuRows:
        """The rows of the step that has just run.

        Raises:
            TypeError: They are not where they should be.
        """


class StepOutput(FvuSource):
    """``{"target", "reconstruction"}`` (and optionally ``mask``, ``position``) in the dict that the step returns, or a tuple of the two."""

    def rows(self, module: nn.Module, outputs: Any, batch: Any) -> FvuRows:
        """The step's own tensors."""
        if isinstance(outputs, tuple | list) and len(outputs) == 2:
            return FvuRows(outputs[0], outputs[1])
        if isinstance(outputs, Mapping) and {"target", "reconstruction"} <= outputs.keys():
            return FvuRows(outputs["target"], outputs["reconstruction"], outputs.get("mask"), outputs.get("position"))
        raise TypeError(
            f"{type(module).__name__}'s step returned {_described(outputs)}: FVUCallback needs a dict with target and reconstruction "
            "(a training step's beside its loss), or settings that name two sites or run the module."
        )


class SitePair(FvuSource):
    """What passes two points of the module during the step; of several passes the last.

    Args:
        target: A site such as ``mlp_out.8``, or ``<module name> input`` or ``output``.
        reconstruction: Likewise.
    """

    def __init__(self, target: str, reconstruction: str) -> None:
        self.points = {"target": target, "reconstruction": reconstruction}
        self._captured: dict[str, Tensor] = {}

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Hooks on both points, gone afterwards."""
        self._captured = {}
        with ExitStack() as stack:
            for name, point in self.points.items():
                stack.enter_context(_captured(module, point, self._keep(name)))
            yield

    def rows(self, module: nn.Module, outputs: Any, batch: Any) -> FvuRows:
        """What was captured."""
        if missing := [point for name, point in self.points.items() if name not in self._captured]:
            raise TypeError(f"{type(module).__name__}'s step did not pass {' and '.join(missing)}.")
        return FvuRows(**self._captured)

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        def keep(value: Tensor) -> None:
            self._captured[name] = value.detach()

        return keep


class ForwardPass(FvuSource):
    """``batch["target"]`` against ``module(batch["input"])``, computed in evaluation mode without gradient: any transcoder.

    Args:
        part: Submodule that is the transcoder; empty = the module itself.
    """

    def __init__(self, part: str = "") -> None:
        self.part = part

    def rows(self, module: nn.Module, outputs: Any, batch: Any) -> FvuRows:
        """Runs the transcoder on the batch's inputs."""
        if not isinstance(batch, Mapping) or not {"input", "target"} <= batch.keys():
            raise TypeError(f"The batch is {_described(batch)}: running a transcoder needs a dict with input and target.")
        with torch.no_grad(), without_trace(module):
            reconstruction = module.get_submodule(self.part)(batch["input"])
        return FvuRows(batch["target"], reconstruction, batch.get("mask"), batch.get("position"))


def counted(rows: FvuRows, batch: Any, drop: set[str], special: set[int]) -> Tensor:
    """(...) bool: which rows count, from the rows' own mask and whatever the batch says of tokens.

    Args:
        rows: The rows.
        batch: Of the step; ``input_ids``, ``attention_mask`` and ``position`` are used where it has them.
        drop: Of ``first``, ``begins``, ``padding``.
        special: Beginning-of-sequence ids.
    """
    lead = rows.target.shape[:-1]
    kept = torch.ones(lead, dtype=torch.bool, device=rows.target.device) if rows.mask is None else rows.mask.bool().clone()
    fields = batch if isinstance(batch, Mapping) else {}
    position = rows.position if rows.position is not None else fields.get("position")
    if "first" in drop:
        if position is not None and position.shape == lead:
            kept &= (position != 0).to(kept.device)
        elif len(lead) == 2:
            kept[:, 0] = False
    ids, attention = fields.get("input_ids", fields.get("token")), fields.get("attention_mask")
    if "begins" in drop and isinstance(ids, Tensor) and ids.shape == lead and special:
        kept &= ~torch.isin(ids, torch.tensor(sorted(special), device=ids.device)).to(kept.device)
    if "padding" in drop and isinstance(attention, Tensor) and attention.shape == lead:
        kept &= attention.bool().to(kept.device)
    return kept


def begin_ids(module: nn.Module) -> set[int]:
    """Beginning-of-sequence ids of the language models inside a module."""
    found: set[int] = set()
    for part in module.modules():
        token = getattr(getattr(part, "config", None), "bos_token_id", None)
        found |= {token} if isinstance(token, int) else set(token) if isinstance(token, list) else set()
    return found


@contextmanager
def _captured(module: nn.Module, point: str, keep: Callable[[Tensor], None]) -> Iterator[None]:
    name, _, end = point.rpartition(" ")
    if end in ("input", "output") and name in dict(module.named_modules()):
        handle = hook_point(module.get_submodule(name), cast(Any, end), False, keep)
        try:
            yield
        finally:
            handle.remove()
        return
    site: ActivationSite = parse_site(point)
    with capture_sites(module, [site]) as found:
        yield
    if site in found:
        keep(found[site])


def _described(value: Any) -> str:
    return f"a dict with {sorted(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
