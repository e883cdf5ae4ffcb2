"""Group-relative policy optimisation with manual optimisation and hooks."""

from .module import GRPOModule
from ..rollouts import HFRollout, RolloutEngine, Sample, Sampling

__all__ = ["GRPOModule", "HFRollout", "RolloutEngine", "Sample", "Sampling"]
