"""Folders that coders come from and go to, in the company of the data that says which sites they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from .interop import load_weights, save_saelens
from .transcoder import Transcoder
from .weights import coder_from, save_weights, weights_of

SITES = ("input_site", "target_site")


def pretrained_coder(folder: str, datamodule: Any) -> Transcoder:
    """A coder of this package, of SAELens or of sparsify.

    Args:
        folder: Where it lies.
        datamodule: The activations that it will see; None or one without sites is not asked.

    Raises:
        ValueError: The data is of other sites than the coder.
    """
    weights = load_weights(folder)
    for end in SITES:
        known, wanted = getattr(weights, end), getattr(datamodule, end, None)
        if known is not None and wanted is not None and known != str(wanted):
            raise ValueError(f"The coder in {folder} has the {end} {known}, but the data has {wanted}: set data.{end} to {known}.")
    return coder_from(weights)


def export_coder(coder: Transcoder, datamodule: Any, folder: Path) -> None:
    """Write a coder in raw units, and for SAELens in ``saelens/`` within where that format can say what it is.

    Args:
        coder: What is written.
        datamodule: Its sites and model are noted where it has any.
        folder: Where to.
    """
    sites = {end: None if (site := getattr(datamodule, end, None)) is None else str(site) for end in SITES}
    model = getattr(getattr(datamodule, "model", None), "model_id", None)
    weights = weights_of(coder, **sites, model=model if isinstance(model, str) else None)
    save_weights(weights, folder)
    try:
        save_saelens(weights, folder / "saelens")
    except ValueError as error:
        rank_zero_info(f"Not exported for SAELens: {error}")
