"""What keeps a verbaliser's texts language: KL terms to what it was and to plain text, and entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from theodolite.functional.talkative_losses import kl_to_reference, token_entropy

from .reconstructor import encode

if TYPE_CHECKING:
    from .module import TalkativeModule

Sums = dict[str, tuple[float, float]]


class Regularisers:
    """``lm_kl * KL(LM || verbaliser) - entropy * H``, per token; terms with weight 0 are not computed.

    LM is the verbaliser's language model as it was when the run was built, after a natural prefix and without any activation: a text is
    likely under it if it reads like text.

    Args:
        lm_kl: Weight of the KL to the language model.
        natural_prefix: What the language model continues; at least one token where ``lm_kl`` > 0.
        entropy: Weight of the entropy bonus.

    Raises:
        ValueError: If a weight is negative, or a prefix is missing.
    """

    def __init__(self, lm_kl: float, natural_prefix: str, entropy: float) -> None:
        for name, value in (("lm_kl", lm_kl), ("entropy", entropy)):
            if value < 0:
                raise ValueError(f"model.{name} is {value}; it must not be negative.")
        if lm_kl > 0 and not natural_prefix:
            raise ValueError("model.lm_kl needs model.natural_prefix, the text that the language model continues; give at least one word.")
        self.lm_kl, self.natural_prefix, self.entropy = lm_kl, natural_prefix, entropy

    def __call__(
        self, module: TalkativeModule, logits: Tensor, activations: Tensor, index: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """(B, T) loss per token, or 0.0, and the terms by name, without graph and without weight.

        Args:
            module: Whose reference is asked.
            logits: (B, T, V) of the verbaliser at the sampling temperature.
            activations: (R, d).
            index: (B,).
            ids: (B, T).
            mask: (B, T).
        """
        loss: Tensor | float = 0.0
        terms: dict[str, Tensor] = {}
        if self.lm_kl > 0:
            prompt = tuple(encode(module.tokenizer, self.natural_prefix))
            reference = module.reference_logits(activations, index, ids, mask, prompt) / module.sampling.temperature
            divergence = kl_to_reference(reference, logits) * mask
            loss, terms["lm_kl"] = loss + self.lm_kl * divergence, divergence.detach()
        if self.entropy > 0:
            entropy = token_entropy(logits) * mask
            loss, terms["entropy"] = loss - self.entropy * entropy, entropy.detach()
        return loss, terms
