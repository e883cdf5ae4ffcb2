"""What a GRPO module refuses before anything is built, each in one sentence."""

from __future__ import annotations

from typing import Any, cast

from theodolite.functional.importance import MISMATCH_MODES
from theodolite.protocols import PromptPreview, PromptReserve

from ..rollouts import SamplesAhead

CHOICES: dict[str, tuple[str, ...]] = {
    "aggregation": ("dapo", "dr_grpo", "grpo", "seq_mean_token_sum"),
    "advantage_scale": ("none", "group", "batch", "rloo"),
    "kl_estimator": ("k1_reward", "k2", "k3", "k3_is"),
    "truncated": ("keep", "mask", "exclude"),
    "zero_variance": ("skip", "drop", "refill"),
    "reward_mix": ("sum", "gdpo"),
    "truncated_sampling": ("refuse", "untruncated"),
}
SMALLEST = {"group_size": 2, "updates_per_window": 1, "refill_attempts": 1, "table_every": 0, "token_budget": 1, "overlong_buffer": 0}


def check_settings(module: Any, mismatch: dict[str, Any] | None) -> None:
    """Refuse settings that cannot work, alone or together.

    Args:
        module: A GRPO module with its settings as attributes.
        mismatch: As the config gives it.

    Raises:
        ValueError: One of them cannot work.
    """
    for name, choices in CHOICES.items():
        if getattr(module, name) not in choices:
            raise ValueError(f"model.{name} is {getattr(module, name)!r}; choose one of {', '.join(choices)}.")
    for name, least in SMALLEST.items():
        value = getattr(module, name)
        if value is not None and value < least:
            why = "; a group-relative advantage needs at least 2 completions per prompt" if name == "group_size" else ""
            raise ValueError(f"model.{name} is {value}; it must be at least {least}{why}.")
    if module.beta < 0:
        raise ValueError(f"model.beta is {module.beta}; a negative KL coefficient would push away from the reference, use 0 or more.")
    if module.overlong_buffer > module.sampling.max_new_tokens:
        raise ValueError(f"model.overlong_buffer is {module.overlong_buffer}; it must not exceed max_new_tokens.")
    if module.reward_mix == "gdpo" and not module.reward_weights:
        raise ValueError("model.reward_mix=gdpo needs model.reward_weights: which components there are, and what each counts.")
    if module.reward_mix == "gdpo" and module.zero_variance != "skip":
        raise ValueError(
            f"model.zero_variance={module.zero_variance} looks for groups whose one reward does not vary, but reward_mix=gdpo trains on "
            "every component apart; set zero_variance to skip, or reward_mix to sum."
        )
    if module.overlap_sampling and not isinstance(module.engine, SamplesAhead):
        raise ValueError(
            f"model.overlap_sampling needs a sampler with weights of its own that computes elsewhere, and {type(module.engine).__name__} "
            "does not sample while the policy trains; set model.rollout to VLLMServerRollout, or overlap_sampling to false."
        )
    truncates = module.sampling.top_p < 1 or module.sampling.top_k > 0
    if mismatch is not None:
        _check_mismatch(mismatch, truncates)
    if truncates and module.truncated_sampling == "refuse":
        raise ValueError(
            f"model.top_p={module.sampling.top_p} and model.top_k={module.sampling.top_k} cut what is sampled, but ratios and gradients "
            "are those of the untruncated distribution; set top_p to 1 and top_k to 0, or truncated_sampling to untruncated to accept that."
        )


def _check_mismatch(mismatch: dict[str, Any], truncates: bool) -> None:
    if set(mismatch) - {"mode", "low", "high"} or mismatch.get("mode") not in MISMATCH_MODES or "high" not in mismatch:
        raise ValueError(f"model.mismatch is {mismatch}; give mode (one of {', '.join(MISMATCH_MODES)}), high and perhaps low.")
    if truncates:
        raise ValueError(
            "model.mismatch corrects towards untruncated probabilities, but top_p or top_k truncate what is sampled, so every weight "
            "would be off by the mass they cut; set top_p to 1 and top_k to 0, or mismatch to null."
        )


def check_reserve(sampler: Any) -> None:
    """Refuse to refill groups from data that know no further prompts.

    Raises:
        TypeError: The training loader's sampler is no :class:`~theodolite.protocols.PromptReserve`.
    """
    if not isinstance(sampler, PromptReserve):
        raise TypeError(
            f"model.zero_variance=refill needs training data that can name further prompts, and a {type(sampler).__name__} cannot; give "
            "the loader a theodolite.datamodules.samplers.DistributedBatchSampler, or choose skip or drop."
        )


def check_preview(trainer: Any, sampler: Any) -> None:
    """Refuse to sample ahead where nobody knows what comes next.

    Args:
        trainer: Whose epochs must end with the data.
        sampler: Of the training loader.

    Raises:
        TypeError: The sampler is no :class:`~theodolite.protocols.PromptPreview`.
        ValueError: ``limit_train_batches`` cuts epochs short, and the next batch is another one than the sampler says.
    """
    if not isinstance(sampler, PromptPreview):
        raise TypeError(
            f"model.overlap_sampling needs training data that can say what comes next, and a {type(sampler).__name__} cannot; give the "
            "loader a theodolite.datamodules.samplers.DistributedBatchSampler, or set it to false."
        )
    if trainer.num_training_batches < len(cast(Any, sampler)) and not trainer.fast_dev_run:
        raise ValueError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} cuts epochs short, and model.overlap_sampling would sample prompts "
            "that never come; leave limit_train_batches out and set max_steps, or set overlap_sampling to false."
        )
