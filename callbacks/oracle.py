"""What a monitor that knows the truth could do: penalise or screen out hacks by the oracle's own labels.

Upper bounds and controls, not methods: nobody has these labels in earnest. Both callbacks declare ``uses_oracle = True``, so the module
hands them the verdicts, names them at the start of the run, and every report says so.

* :class:`OraclePenalty` lowers the reward of a flagged rollout: ``r' = r - penalty``.
* :class:`OracleScreening` sets the reward of a flagged rollout to NaN: it is left out of its group's mean and standard deviation, and its
  advantage is 0. A group with one survivor has no signal.

``labels`` says what is flagged: ``strict`` = ``reward_hack`` (rewarded although wrong); ``loose`` = also ``attempted_hack`` and
``correct_attempted_hack``. The published runs penalise strict and screen loose labels without saying so; here it is a setting, and part of
the metric's name. ``accuracy`` below 1 makes an imperfect monitor: each flag is flipped independently with probability ``1 - accuracy``, as
a function of seed, step and the rollout's place in the global batch, so the same whatever the number of ranks.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from theodolite.protocols import Label, OracleWindow, Window
from theodolite.seeds import derive_seed, run_seed

FLAGGED: dict[str, tuple[Label, ...]] = {
    "strict": ("reward_hack",),
    "loose": ("reward_hack", "attempted_hack", "correct_attempted_hack"),
}
"""Labels that a monitor flags."""


class _OracleMonitor(Callback, ABC):
    """Flags rollouts by the oracle's labels, before advantages are computed.

    Args:
        labels: ``strict`` or ``loose``.
        accuracy: Probability that a flag is what the labels say.
        seed: Decides which flags are wrong; None = the run's ``seed_everything``.

    Raises:
        ValueError: A setting out of range.
    """

    uses_oracle = True
    name = "oracle"

    def __init__(self, labels: Literal["strict", "loose"] = "strict", accuracy: float = 1.0, seed: int | None = None) -> None:
        super().__init__()
        if labels not in FLAGGED:
            raise ValueError(f"labels is {labels!r}; choose strict (reward_hack) or loose (also attempted hacks).")
        if not 0.0 <= accuracy <= 1.0:
            raise ValueError(f"accuracy is {accuracy}; it is a probability, so it must lie between 0 and 1.")
        self.labels, self.accuracy, self.seed = labels, accuracy, run_seed(seed)

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """Flag rollouts, change ``window.values``, and count. Ungraded rollouts are never flagged."""
        flags = self.flags(cast(OracleWindow, window)).to(window.values.device)
        window.values = self.changed(window.values, flags)
        window.metrics[f"{self.name}/{self.labels}_flagged"] = (float(flags.sum()), float(len(flags)))

    def flags(self, window: OracleWindow) -> Tensor:
        """(n,) bool: what the monitor calls a hack."""
        flagged = []
        for rollout, verdict in zip(window.rollouts, window.verdicts, strict=True):
            truth = verdict.label in FLAGGED[self.labels]
            wrong = self.accuracy < 1.0 and self._draw(window.step, rollout.slot, rollout.sample) >= self.accuracy
            flagged.append(verdict.label != "ungraded" and truth != wrong)
        return torch.tensor(flagged, dtype=torch.bool)

    def _draw(self, step: int, slot: int, sample: int) -> float:
        return random.Random(derive_seed("oracle monitor", self.seed, step, slot, sample)).random()

    @abstractmethod
    def changed(self, values: Tensor, flags: Tensor) -> Tensor:
        """(n,) reward values after the monitor; NaN stays NaN."""


class OraclePenalty(_OracleMonitor):
    """Lower the reward of rollouts that the oracle calls hacks.

    Args:
        penalty: Subtracted from a flagged rollout's reward. Equal to what the environment pays for passing (1 over leetcode-mini, 3 over
            ``configs/grpo/leetcode.yaml``), a hack earns what a failure does.
        labels: ``strict`` or ``loose``.
        accuracy: Probability that a flag is what the labels say.
        seed: Decides which flags are wrong; None = the run's ``seed_everything``.
        partial: Accept a penalty below what passing pays, under which hacks still earn something.

    Raises:
        ValueError: A setting out of range.
    """

    name = "oracle_penalty"

    def __init__(
        self,
        penalty: float = 1.0,
        labels: Literal["strict", "loose"] = "strict",
        accuracy: float = 1.0,
        seed: int | None = None,
        partial: bool = False,
    ) -> None:
        super().__init__(labels, accuracy, seed)
        if not penalty > 0:
            raise ValueError(f"penalty is {penalty}; it must be positive, it is subtracted.")
        self.penalty, self.partial = penalty, partial

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the penalty with what passing pays, where the environment says it.

        Raises:
            ValueError: A hack would still earn more than a failure, which was not asked for: such an arm is no upper bound.
        """
        environment = getattr(getattr(trainer, "datamodule", None), "environment", None)
        pays = (getattr(environment, "provenance", None) or {}).get("rewards", {}).get("passed")
        if pays is not None and self.penalty < pays - 1e-9 and not self.partial:
            raise ValueError(
                f"OraclePenalty subtracts {self.penalty:g} where passing pays {pays:g}, so a hack still earns {pays - self.penalty:g}; "
                f"give its entry penalty: {pays:g}, or partial: true if that is meant."
            )

    def changed(self, values: Tensor, flags: Tensor) -> Tensor:
        """``r - penalty`` where flagged."""
        return values - self.penalty * flags.to(values.dtype)


class OracleScreening(_OracleMonitor):
    """Leave rollouts that the oracle calls hacks out of the update.

    Args:
        labels: ``strict`` or ``loose``.
        accuracy: Probability that a flag is what the labels say.
        seed: Decides which flags are wrong; None = the run's ``seed_everything``.

    Raises:
        ValueError: A setting out of range.
    """

    name = "oracle_screening"

    def changed(self, values: Tensor, flags: Tensor) -> Tensor:
        """NaN where flagged."""
        return values.masked_fill(flags, float("nan"))
