"""Checkpoints of an adapter leave its frozen base out: it is rebuilt from where it came from."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor, nn


def without_base(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A state dict without the parameters of ``module`` that are not trained."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def with_base(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """The other way round: what is not trained comes from ``module`` as it was built.

    Raises:
        ValueError: The state lacks something that is trained, or has something that the module does not know.
    """
    own: dict[str, Tensor] = module.state_dict()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    missing, unknown = sorted(trained - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the model has not"
        raise ValueError(f"The checkpoint is of another adapter: it {what}; resume with the model.lora it was trained with.")
    return own | state


class AdapterCheckpoints(L.LightningModule):
    """A module whose checkpoints leave out what an adapter does not train.

    Attributes:
        lora: The adapter's settings; None = no adapter, and whole checkpoints.
        model: None until it is built.
    """

    lora: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With an adapter, leave the frozen base out."""
        super().on_save_checkpoint(checkpoint)
        if self.lora is not None:
            checkpoint["state_dict"] = without_base(checkpoint["state_dict"], self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With an adapter, the base is the one that was built. A strategy of shards has loaded, and taken out, the weights before."""
        super().on_load_checkpoint(checkpoint)
        if self.lora is not None and getattr(self, "model", None) is not None and "state_dict" in checkpoint:
            checkpoint["state_dict"] = with_base(checkpoint["state_dict"], self)
