"""What is done to training, and measured of it."""

from typing import Any

from theodolite.callbacks.activation_probe import ActivationProbe
from theodolite.callbacks.best_of_k import BestOfKCallback
from theodolite.callbacks.decomposition_figures import DecompositionFigures
from theodolite.callbacks.direction_checks import DirectionChecks
from theodolite.callbacks.direction_sources import DirectionSource, GradientDifference, HaarRandom
from theodolite.callbacks.fvu import FVUCallback
from theodolite.callbacks.gradient_projection import GradientProjectionCallback
from theodolite.callbacks.heartbeat import Heartbeat
from theodolite.callbacks.live_direction import LiveGradientDifference
from theodolite.callbacks.oracle import OraclePenalty, OracleScreening
from theodolite.callbacks.pgd_recon_loss import PGDReconLossCallback
from theodolite.callbacks.rebound import ReboundCallback
from theodolite.callbacks.residual_direction import ResidualDifference
from theodolite.callbacks.rollout_features import RolloutFeatures


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import, and only its own users need it
    if name == "ProjectionTrainerCallback":
        from theodolite.callbacks.trainer_callback import ProjectionTrainerCallback

        return ProjectionTrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
