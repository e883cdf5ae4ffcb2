"""Group-relative policy optimisation with manual optimisation and hooks."""

from ..decoding import Sampling
from ..rollouts import HFRollout, RolloutEngine, Sample
from .module import GRPOModule

__all__ = ["GRPOModule", "HFRollout", "RolloutEngine", "Sample", "Sampling"]
