"""Group-relative policy optimisation with manual optimisation and hooks."""

from ..rollouts import HFRollout, RolloutEngine, Sample, Sampling
from .module import GRPOModule

__all__ = ["GRPOModule", "HFRollout", "RolloutEngine", "Sample", "Sampling"]
