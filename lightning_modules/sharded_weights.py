"""A policy module whose weights may lie in shards: when they are whole, how gradients meet, what its checkpoints say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from theodolite.distributed import gather_objects, sum_gradients

from .adapter_checkpoints import AdapterCheckpoints
from .sharding import ShardedModel

OUT_OF_MEMORY_IN_SHARDS = (
    "Memory ran out in the gradient of weights in shards, where a rank cannot go back without the others; lower model.micro_batch_size or "
    "model.token_budget."
)
CHECKPOINT_KEY = "theodolite_shards_of"


def check_sharding(module: Any, watchers: Sequence[str]) -> None:
    """Refuse what does not work under ``ModelParallelStrategy``, before a model is built.

    Args:
        module: A policy module with its trainer.
        watchers: Names of callbacks that look at the gradient after every microbatch.

    Raises:
        ValueError: Tensor parallelism, checkpoints in shards, a sampler with weights of its own, or such a callback.
    """
    strategy, ranks = module.trainer.strategy, module.trainer.world_size
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "ModelParallelStrategy would split single matrices, and only whole layers' weights are sharded here; set its "
            f"tensor_parallel_size to 1 and data_parallel_size to {ranks}, the number of processes."
        )
    if strategy._save_distributed_checkpoint and module.trainer.checkpoint_callbacks:
        raise ValueError(
            "ModelParallelStrategy would save a folder of shards, of an adapter's frozen base as well; set its "
            "save_distributed_checkpoint to false."
        )
    if module.engine.own_numerics:
        raise ValueError(
            f"{type(module.engine).__name__} cannot be given weights that lie in shards; set model.rollout to null, or trainer.strategy to "
            "ddp."
        )
    if watchers:
        raise ValueError(
            f"{watchers[0]} looks at the gradient after every microbatch, when there is none of the shards it knows; leave it out, or set "
            "trainer.strategy to ddp."
        )


class ShardedWeights(AdapterCheckpoints):
    """A module whose models may lie in shards: the first of them is trained. Without any, nothing here does anything."""

    shards = False
    """Whether a subclass trains under ``ModelParallelStrategy``."""
    _sharded: Sequence[ShardedModel] = ()

    def setup(self, stage: str) -> None:
        """Refuse a strategy that would shard nothing.

        Raises:
            ValueError: The strategy is ``ModelParallelStrategy``, and this module keeps its weights whole.
        """
        super().setup(stage)
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self.shards:
            raise ValueError(f"{type(self).__name__} does not lay its weights in shards; set trainer.strategy to ddp.")

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that are optimised, in the model's order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def shard(self, *models: nn.Module) -> None:
        """Leave this rank its shards of models that are the same on every rank; ``p.data`` of before is freed.

        Args:
            models: The trained one first.
        """
        mesh = cast(DeviceMesh, self.device_mesh)["data_parallel"]
        self._sharded = [ShardedModel(model, mesh) for model in models]
        self.strict_loading = self.lora is None  # an adapter's base is not saved

    @property
    def in_shards(self) -> bool:
        """Whether a pass through the trained model would be a collective now."""
        return bool(self._sharded) and not self._sharded[0].is_whole

    def idle_passes(self, own: int) -> int:
        """Passes that this rank makes to no effect: in shards each is a collective. All ranks must call it; without shards there are none.

        Args:
            own: Passes that it has to make.
        """
        return max(gather_objects(own)) - own if self.in_shards else 0

    def gather_weights(self) -> None:
        """All weights of all models on every rank. All ranks must call it."""
        for sharded in self._sharded:
            sharded.gather()

    def release_weights(self) -> None:
        """Back to shards."""
        for sharded in self._sharded:
            sharded.release()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, no pass is a collective. All ranks must call it."""
        before = [sharded for sharded in self._sharded if not sharded.is_whole]
        self.gather_weights()
        try:
            yield
        finally:
            for sharded in before:
                sharded.release()

    @contextmanager
    def gradients_over_ranks(self, whole: bool) -> Iterator[None]:
        """Backward passes inside; afterwards every ``p.grad`` is the sum over ranks. All ranks must call it.

        Args:
            whole: Of weights in shards: see :meth:`ShardedModel.summed_gradients`.
        """
        if not self._sharded:
            yield
            sum_gradients(self.trainable_parameters())
            return
        for frozen in self._sharded[1:]:
            frozen.release()
        with self._sharded[0].summed_gradients(whole):
            yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what was trained in shards."""
        super().on_save_checkpoint(checkpoint)
        if self._sharded:
            checkpoint[CHECKPOINT_KEY] = self._trained_names()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose weights and moments would not all have found their shards.

        Raises:
            ValueError: It was saved without shards, or something else was trained.
        """
        super().on_load_checkpoint(checkpoint)
        if self._sharded and checkpoint.get(CHECKPOINT_KEY) != self._trained_names():
            how = "of other parameters" if CHECKPOINT_KEY in checkpoint else "saved under another strategy"
            raise ValueError(f"The checkpoint is {how}, so it cannot be resumed under ModelParallelStrategy; resume as it was trained.")

    def _trained_names(self) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]
