"""Which correction is in force for a sampler whose numbers are not the trainer's."""

from __future__ import annotations

from typing import Any, Literal

LONG = 512
"""Completion tokens from which on products of ratios collapse to 0 or grow without bound, so that a mean is taken instead."""

LONG_DEFAULT: dict[str, Any] = {"mode": "geometric_mis", "low": 0.9, "high": 1.1}
"""A sequence is dropped where its tokens are off by 10 % on average: twice what the check of equal weights lets pass in bfloat16."""

SHORT_DEFAULT: dict[str, Any] = {"mode": "token_tis", "high": 2.0}
"""Every token's weight is its ratio, at most 2."""


def settled_mismatch(module: Any, given: dict[str, Any] | Literal["auto"] | None) -> dict[str, Any] | None:
    """What a config's ``mismatch`` comes to: ``auto`` corrects for samplers with numerics of their own, and for no others.

    Args:
        module: A GRPO module with its sampler and settings as attributes.
        given: As the config gives it.

    Raises:
        ValueError: ``given`` is another word, would correct what is 1 by construction, or the log-probabilities of a truncating sampler
            of its own would enter the objective.
    """
    if isinstance(given, str) and given != "auto":
        raise ValueError(f"model.mismatch is {given!r}; give auto, null, or mode, high and perhaps low.")
    foreign, sampling = module.engine.own_numerics, module.sampling
    enters = module.reuse_sampler_log_probs or module.overlap_sampling or module.kl_estimator == "k1_reward"
    if foreign and (sampling.top_p < 1 or sampling.top_k) and enters:
        raise ValueError(
            "model.rollout reports log-probabilities of the truncated distribution under top_p or top_k, and reuse_sampler_log_probs, "
            "overlap_sampling and kl_estimator=k1_reward would take them for those of the policy; set top_p to 1 and top_k to 0, or "
            "choose otherwise."
        )
    if module.old_is_the_samplers:  # ratios already are those of the policy and the sampler
        if given not in ("auto", None):
            which = "overlap_sampling" if module.overlap_sampling else "reuse_sampler_log_probs"
            raise ValueError(
                f"model.mismatch weighs the trainer's old probabilities against the sampler's, and {which} takes the sampler's for both, "
                "so every weight would be 1; set one of them to null or false."
            )
        return None
    if given != "auto":
        return given
    if not foreign:
        return None
    return dict(LONG_DEFAULT if sampling.max_new_tokens > LONG else SHORT_DEFAULT)
