"""The parts of a talkative autoencoder as a config states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from theodolite.functional.talkative_losses import RECONSTRUCTION_LOSSES

from ..policy import check_policy_folder


@dataclass(frozen=True)
class VerbaliserSettings:
    """A causal language model that reads an activation at one position of its prompt.

    Attributes:
        model: Hub id or folder, or the fields of a ``transformers`` config for a random initialisation.
        revision: Hub revision.
        tokenizer: Hub id or folder of the tokenizer that verbaliser and reconstructors share; null = the model's own.
        train: ``full``, ``lora`` or ``frozen`` (only the injection learns).
        lora: Fields of ``peft.LoraConfig``, for ``train: lora``.
        prompt: What stands before the text to be written; holds ``marker`` once.
        marker: A string of exactly one token, whose residual stream the activation overwrites.
        chat: Send the prompt through the tokenizer's chat template as a user's message.
        injection: ``projection`` (affine, identity at initialisation) or ``fixed_norm`` (the activation scaled to the norm ``scale``; no
            parameters).
        layers: Overwrite the marker's residual stream before each of the first ``layers`` decoder layers; 1 = only its embedding.
        per_layer: A projection of its own for every overwritten layer.
        scale: Norm of a ``fixed_norm`` injection; take about the mean norm of the activations.
        standardise: ``projection`` only: feed activations centred and scaled to unit variance (with statistics of the training rows).
        fixed_length: Every text has exactly ``max_new_tokens`` tokens, the end token is never written; otherwise a text ends with it, and
            one that does not is no text.
    """

    model: str | dict[str, Any]
    revision: str | None = None
    tokenizer: str | None = None
    train: str = "full"
    lora: dict[str, Any] | None = None
    prompt: str = "<act>"
    marker: str = "<act>"
    chat: bool = False
    injection: str = "projection"
    layers: int = 1
    per_layer: bool = False
    scale: float | None = None
    standardise: bool = True
    fixed_length: bool = False

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            ValueError: One sentence that names the key.
        """
        _model("verbaliser", self.model, self.tokenizer)
        choice("verbaliser.train", self.train, ("full", "lora", "frozen"))
        choice("verbaliser.injection", self.injection, ("projection", "fixed_norm"))
        if (self.train == "lora") != (self.lora is not None):
            raise ValueError("model.verbaliser.lora holds the adapter's fields when, and only when, model.verbaliser.train is lora.")
        if self.injection == "fixed_norm" and (self.scale is None or self.scale <= 0 or self.per_layer):
            raise ValueError("model.verbaliser.injection=fixed_norm needs a scale above 0 (the norm to inject) and no per_layer maps.")
        if self.injection == "projection" and self.scale is not None:
            raise ValueError("model.verbaliser.scale is the norm of a fixed_norm injection; leave it out with a projection.")
        if self.layers < 1:
            raise ValueError(f"model.verbaliser.layers is {self.layers}; at least the embedding (1) must be overwritten.")
        if self.prompt.count(self.marker) != 1:
            raise ValueError(f"model.verbaliser.prompt must hold the marker {self.marker!r} exactly once, got {self.prompt!r}.")


@dataclass(frozen=True)
class ReconstructorSettings:
    """A language model, cut off after some layers, with a linear head read at the last token of a template.

    Attributes:
        model: Hub id or folder, or the fields of a ``transformers`` config for a random initialisation.
        revision: Hub revision.
        layers: Decoder layers that are kept; null = all. For activations of ``resid_post.l`` take ``l + 1``.
        prefix: Text before the description.
        suffix: Text after it; at least one token, the last of which is read.
        bias: Give the head a bias. Its weight is the identity at initialisation.
        seed: Of random initialisations, so that two reconstructors of one architecture differ.
    """

    model: str | dict[str, Any]
    revision: str | None = None
    layers: int | None = None
    prefix: str = ""
    suffix: str = "<act>"
    bias: bool = True
    seed: int = 0

    def check(self, name: str) -> None:
        """Refuse settings that cannot work.

        Raises:
            ValueError: One sentence that names the key under ``model.<name>``.
        """
        _model(name, self.model, "shared")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"model.{name}.layers is {self.layers}; keep at least one decoder layer.")
        if not self.suffix:
            raise ValueError(f"model.{name}.suffix is empty; its last token is where the vector is read, so give it at least one.")


def _model(name: str, model: str | dict[str, Any], tokenizer: str | None) -> None:
    if isinstance(model, str):
        check_policy_folder(model, f"model.{name}.model")
    elif "model_type" not in model:
        raise ValueError(f"model.{name}.model is a config without model_type; name the architecture, for example model_type: qwen3.")
    elif tokenizer is None:
        raise ValueError(f"model.{name}.model is a config without weights, so model.{name}.tokenizer must say how text is encoded.")


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices, naming ``model.<name>``."""
    if value not in choices:
        raise ValueError(f"model.{name} is {value!r}; choose one of {', '.join(choices)}.")


def check_loss(name: str, value: str) -> None:
    """Refuse the name of a loss that does not exist."""
    choice(name, value, tuple(RECONSTRUCTION_LOSSES))
