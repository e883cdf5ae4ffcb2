"""Which Lightning strategies a projection can work under."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from theodolite.callbacks.direction_sources import DirectionSource


def check_strategy(strategy: Any, source: DirectionSource | None, route: bool) -> None:
    """Refuse what shards gradients in a way that cannot be projected (``ValueError``, one sentence)."""
    sharded = isinstance(strategy, ModelParallelStrategy)
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not whole and not sharded:
        raise ValueError(
            f"GradientProjectionCallback cannot read whole gradients under {type(strategy).__name__}: "
            "use a single device, DDP or ModelParallelStrategy (FSDP2)."
        )
    if sharded and source is not None and source.needs_gradients:
        raise ValueError(
            f"{type(source).__name__} cannot extract from sharded weights: extract on one device, save it and give the folder."
        )
    if sharded and route:
        raise ValueError("route=True keeps whole parked weights, which a sharded checkpoint would lose: use a single device or DDP.")
