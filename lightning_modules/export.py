"""The trained policy as a plain folder that ``transformers``, or PEFT, loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from .policy_module import PolicyModule


def export_policy(module: PolicyModule, folder: Path) -> None:
    """Write model (or adapter) and tokenizer; what was there is replaced at the end. All ranks must call it, rank 0 writes.

    Args:
        module: Its policy; weights in shards are put together on the CPU.
        folder: Where to.
    """
    whole: dict[str, Any] = {}
    if module._sharded:
        whole["state_dict"] = module._sharded[0].whole_state(trained_only=module.lora is not None)
    if module.global_rank != 0:
        return
    partial = folder.with_suffix(".tmp")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    cast(Any, module.causal_lm).save_pretrained(partial, **whole)
    module.tokenizer.save_pretrained(partial)
    partial.rename(folder)
