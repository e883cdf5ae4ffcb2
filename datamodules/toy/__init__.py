"""Synthetic features and sequences with a known ground truth."""

from .features import ToyDataModule, ToyStream

__all__ = ["ToyDataModule", "ToyStream"]
