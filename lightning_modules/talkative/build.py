"""Builds a verbaliser and the tokenizer that it shares with the reconstructors."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedTokenizerBase

from ..policy import add_lora, load_policy, load_tokenizer
from .injection import FixedNorm, Projection, Standardise
from .reconstructor import encode
from .settings import VerbaliserSettings
from .verbaliser import ActivationVerbaliser


def shared_tokenizer(settings: VerbaliserSettings) -> PreTrainedTokenizerBase:
    """The tokenizer that the settings name, or the verbaliser's own."""
    source = settings.tokenizer if settings.tokenizer is not None else settings.model
    assert isinstance(source, str)  # checked with the settings
    return load_tokenizer(source, settings.revision)


def build_verbaliser(
    settings: VerbaliserSettings, width: int, dtype: str, seed: int, tokenizer: PreTrainedTokenizerBase
) -> ActivationVerbaliser:
    """Load the language model, find the marker in its prompt, and make the injection.

    Args:
        settings: What to build.
        width: d of the activations.
        dtype: Of the language model; a projection is float32.
        seed: Of random initialisations.
        tokenizer: Encodes the prompt.

    Raises:
        ValueError: If the marker is not exactly one token that stands in the prompt once, or there are fewer layers than overwritten ones.
    """
    end_id = cast(int, tokenizer.eos_token_id)
    lm = load_policy(settings.model, settings.revision, dtype, seed, len(tokenizer), end_id)
    config = lm.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if settings.layers > config.num_hidden_layers:
        raise ValueError(f"model.verbaliser.layers is {settings.layers}, but the model has {config.num_hidden_layers} layers.")
    if settings.lora is not None:
        lm = add_lora(lm, settings.lora, seed)
    elif settings.train == "frozen":
        lm.requires_grad_(False)
    prompt_ids, position = prompt_with_marker(settings, tokenizer)
    if settings.injection == "projection":
        injection = Projection(width, config.hidden_size, settings.layers, settings.per_layer)
    else:
        injection = FixedNorm(width, config.hidden_size, settings.layers, cast(float, settings.scale))
    extra = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    ends = {i for i in (end_id, *(extra if isinstance(extra, list) else [extra])) if isinstance(i, int) and i < len(tokenizer)}
    # a fixed-length text is plain words: it must survive being decoded and encoded again
    forbidden = set(cast("list[int]", tokenizer.all_special_ids)) | ends if settings.fixed_length else set()
    beyond = range(len(tokenizer), config.vocab_size)  # rows that only pad the embedding table
    return ActivationVerbaliser(
        lm,
        Standardise(width),
        injection,
        prompt_ids,
        position,
        sorted(ends),
        cast(int, tokenizer.pad_token_id),
        sorted(forbidden | set(beyond)),
    )


def prompt_with_marker(settings: VerbaliserSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of the prompt and the marker's index.

    Raises:
        ValueError: If the marker is not one token, or does not stand in the prompt exactly once.
    """
    marker = encode(tokenizer, settings.marker)
    if len(marker) != 1:
        raise ValueError(f"model.verbaliser.marker {settings.marker!r} is {len(marker)} tokens; choose a string of exactly one.")
    if not settings.chat:
        ids = cast("list[int]", tokenizer(settings.prompt)["input_ids"])
    elif tokenizer.chat_template is None:
        raise ValueError("model.verbaliser.chat is true, but the tokenizer has no chat template; set it to false.")
    else:
        message = [{"role": "user", "content": settings.prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False, enable_thinking=False)
        ids = encode(tokenizer, cast(str, text))
    if ids.count(marker[0]) != 1:
        raise ValueError(
            f"The marker {settings.marker!r} stands {ids.count(marker[0])} times in the tokens of model.verbaliser.prompt; "
            f"put characters round it that do not merge with it."
        )
    return ids, ids.index(marker[0])
