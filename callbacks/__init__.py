"""What is done to training, and measured of it."""

from typing import TYPE_CHECKING

from theodolite.lazy_names import lazy_names

if TYPE_CHECKING:
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
    from theodolite.callbacks.trainer_callback import ProjectionTrainerCallback

__getattr__ = lazy_names(
    __name__,
    {
        "ActivationProbe": ".activation_probe",
        "BestOfKCallback": ".best_of_k",
        "DecompositionFigures": ".decomposition_figures",
        "DirectionChecks": ".direction_checks",
        "DirectionSource": ".direction_sources",
        "FVUCallback": ".fvu",
        "GradientDifference": ".direction_sources",
        "GradientProjectionCallback": ".gradient_projection",
        "HaarRandom": ".direction_sources",
        "Heartbeat": ".heartbeat",
        "LiveGradientDifference": ".live_direction",
        "OraclePenalty": ".oracle",
        "OracleScreening": ".oracle",
        "PGDReconLossCallback": ".pgd_recon_loss",
        "ProjectionTrainerCallback": ".trainer_callback",
        "ReboundCallback": ".rebound",
        "ResidualDifference": ".residual_direction",
        "RolloutFeatures": ".rollout_features",
    },
)
