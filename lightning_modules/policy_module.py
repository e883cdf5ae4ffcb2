"""What every policy module shares: building the model, encoding text, scoring sequences, held-out evaluation, export."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from theodolite.distributed import on_every_rank
from theodolite.protocols import Chat, Environment, TokenSequence
from theodolite.seeds import derive_seed, run_seed

from .decoding import Sampling
from .export import export_policy
from .held_out import HeldOutEvaluation, final_protocol
from .manual import SCHEDULES, ManualModule
from .policy import add_lora, check_attention, check_lora, check_policy_folder, check_precision, freeze_all_but, load_policy, load_tokenizer
from .recomputation import recomputable_layers, recomputing
from .rollout_choice import build_engine
from .rollouts import RolloutEngine, Sample, sample_seeds
from .scoring import completion_log_probs, completion_states, pad_sequences, shared_prefix_log_probs, supports_shared_prefix
from .sharded_weights import ShardedWeights
from .tokenizer import train_tokenizer


def _as_is(batch: Any) -> Any:
    return batch


class PolicyModule(ShardedWeights, ManualModule):
    """A causal language model that can be evaluated as an answerer of problems.

    Subclasses add how it is trained, with manual optimisation. The model is built in ``configure_model``, after every config has been
    checked.

    Args:
        policy: Hub id or folder, or the fields of a ``transformers`` config for a random initialisation.
        revision: Hub revision of the policy and its tokenizer.
        tokenizer: Hub id or folder of the tokenizer; null = the policy's own.
        train_tokenizer: Train one on the datamodule's corpus: arguments of ``train_bpe_tokenizer`` (``vocab_size``, ``boundaries``), or
            ``kind: words`` and those of ``train_word_tokenizer``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2`` (half precision, and its package); null = what ``transformers`` chooses.
        lora: Fields of ``peft.LoraConfig`` (``r``, ``lora_alpha``, ``target_modules``); null = no adapter.
        trainable: Patterns of parameter names to train, e.g. ``*.layers.*_proj.weight``; null = all (with ``lora``: the adapter).
        seed: Seed of sampling and of random initialisations; null = the run's ``seed_everything``.
        lr: Learning rate.
        betas: Adam's decay rates.
        weight_decay: Decoupled weight decay.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: ``constant``, or ``cosine`` to ``min_lr_fraction`` over the trainer's ``max_steps``, or ``linear`` likewise.
        min_lr_fraction: Where a decaying schedule ends, as a fraction of ``lr``.
        max_grad_norm: Gradient-norm clip, applied after all callbacks have seen the gradient; 0 = off.
        max_new_tokens: Longest completion in tokens, end token included.
        temperature: Sampling temperature, in training and (unless overridden) in evaluation.
        top_p: Nucleus mass; 1 = off.
        top_k: Kept tokens; 0 = off.
        eval_temperature: Temperature in evaluation; null = ``temperature``.
        eval_top_p: Nucleus mass in evaluation; null = ``top_p``.
        eval_samples: Completions per held-out problem.
        eval_drift: Also measure how far the policy is from the one that training began with (``kl_k1``, ``kl_k3`` per token).
        test_sampling: ``samples``, ``temperature`` and ``top_p`` of ``test``, where they are others than in validation.
        micro_batch_size: Sequences per forward pass on one rank; null = all of a step's at once.
        gradient_checkpointing: Keep only every layer's input for the backward pass and compute the layer once more there: a third more
            products for a fraction of the activations. Such passes take the padded path, as a recomputed layer has no cache.
        shared_prefix: Score completions with every distinct prompt of a microbatch computed once. Exact; a model whose cache cannot be
            shared (sliding windows, recurrent layers) takes the padded path, which is said at start.
        merge_adapter: Fold a LoRA adapter into a copy of its base while sampling (and in the gradient's split path): faster for that much
            memory. Float32 only: a rounded sum would be another policy than the one trained.
        rollout: ``class_path`` and ``init_args`` of another sampler, e.g. ``VLLMRollout`` or ``VLLMServerRollout``; null = the trainer's
            own model decodes.
        export: Save the trained policy as a plain ``transformers`` (or PEFT) folder ``policy/`` in the run directory.
    """

    updates_per_window = 1

    def __init__(
        self,
        policy: str | dict[str, Any],
        revision: str | None = None,
        tokenizer: str | None = None,
        train_tokenizer: dict[str, Any] | None = None,
        dtype: str = "float32",
        attention: str | None = None,
        lora: dict[str, Any] | None = None,
        trainable: list[str] | None = None,
        seed: int | None = None,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: str = "constant",
        min_lr_fraction: float = 0.0,
        max_grad_norm: float = 1.0,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        eval_temperature: float | None = None,
        eval_top_p: float | None = None,
        eval_samples: int = 1,
        eval_drift: bool = False,
        test_sampling: dict[str, float] | None = None,
        micro_batch_size: int | None = None,
        gradient_checkpointing: bool = False,
        shared_prefix: bool = True,
        merge_adapter: bool = False,
        rollout: dict[str, Any] | None = None,
        export: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        if isinstance(policy, str):
            check_policy_folder(policy)
        if isinstance(policy, dict) and tokenizer is None and train_tokenizer is None:
            raise ValueError(
                "model.policy is a config without weights, so model.tokenizer or model.train_tokenizer must say how text is encoded."
            )
        if schedule not in SCHEDULES:
            raise ValueError(f"model.schedule is {schedule!r}; choose constant, linear or cosine.")
        if merge_adapter and dtype != "float32":
            raise ValueError(f"model.merge_adapter rounds the merged weights in {dtype}; use dtype float32, or set it to false.")
        check_attention(attention)
        check_lora(lora, trainable, exports_without_base=export and isinstance(policy, dict))
        self.policy_source, self.revision, self.tokenizer_source, self.train_tokenizer = policy, revision, tokenizer, train_tokenizer
        self.dtype_name, self.attention, self.lora, self.trainable = dtype, attention, lora, trainable
        self.run_seed = run_seed(seed)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_steps, self.schedule, self.min_lr_fraction, self.max_grad_norm = warmup_steps, schedule, min_lr_fraction, max_grad_norm
        self.sampling = Sampling(max_new_tokens, temperature, top_p, top_k)
        eval_temperature = temperature if eval_temperature is None else eval_temperature
        self.eval_sampling = Sampling(max_new_tokens, eval_temperature, top_p if eval_top_p is None else eval_top_p, top_k)
        self.eval_samples, self.eval_drift, self.micro_batch_size, self.export = eval_samples, eval_drift, micro_batch_size, export
        self.test_samples, self.test_sampling = final_protocol(test_sampling, eval_samples, self.eval_sampling)
        self.shared_prefix, self.gradient_checkpointing = shared_prefix, gradient_checkpointing
        self.engine: RolloutEngine = build_engine(rollout, merge_adapter)
        self.model: nn.Module | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._reference: list[Any] = []  # in a list so that it is no submodule: never trained, moved or saved with the policy
        self._evaluation = HeldOutEvaluation(self)
        self.seconds: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        """Refuse a precision that cannot train; let no precision plugin walk into a batch: rows hold no tensors, and frozen ones fail."""
        super().setup(stage)
        if stage == "fit":
            check_precision(str(self.trainer.precision))
            check_attention(self.attention, self.dtype_name, str(self.trainer.precision))
        cast(Any, self.trainer).precision_plugin.convert_input = _as_is

    def configure_model(self) -> None:
        """Build tokenizer and model once; Lightning calls this before fit, validate and test."""
        if self.model is None:
            self._tokenizer = self._build_tokenizer()
            vocabulary = (len(self._tokenizer), cast(int, self._tokenizer.eos_token_id))
            self.model = load_policy(self.policy_source, self.revision, self.dtype_name, self.run_seed, *vocabulary, self.attention)
            if self.lora is not None:
                self.model = add_lora(self.model, self.lora, self.run_seed)
            elif self.trainable is not None:
                freeze_all_but(self.model, self.trainable)
            if self.gradient_checkpointing:
                recomputable_layers(self.model)
            if self.shared_prefix and not supports_shared_prefix(self.causal_lm):
                rank_zero_info("shared_prefix: this model's cache cannot be shared between completions, the padded path is used.")
                self.shared_prefix = False
        if self.eval_drift and self.lora is None and not self._reference:  # before a checkpoint can replace the weights
            self._reference.append(copy.deepcopy(self.causal_lm).requires_grad_(False).eval())
        folder = None if self._trainer is None else Path(self._trainer.default_root_dir)
        self.engine.setup(self.causal_lm, self.end_ids, self.pad_id, folder)

    def _build_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.train_tokenizer is None:
            source = self.tokenizer_source if self.tokenizer_source is not None else self.policy_source
            assert isinstance(source, str)
            return load_tokenizer(source, self.revision)
        corpus = getattr(self._datamodule(), "corpus", None)
        if corpus is None:
            raise ValueError("model.train_tokenizer needs a datamodule with a corpus; use one that offers it, or name a model.tokenizer.")
        return train_tokenizer(corpus(), **self.train_tokenizer)

    @property
    def causal_lm(self) -> nn.Module:
        """The model. Raises ``RuntimeError`` before ``configure_model``."""
        if self.model is None:
            raise RuntimeError("The policy has not been built yet; call configure_model() first (a Trainer does).")
        return self.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises ``RuntimeError`` before ``configure_model``."""
        if self._tokenizer is None:
            raise RuntimeError("The tokenizer has not been built yet; call configure_model() first (a Trainer does).")
        return self._tokenizer

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a completion: the tokenizer's end token and whatever the model's generation config adds."""
        extra = getattr(getattr(self.causal_lm, "generation_config", None), "eos_token_id", None)
        candidates = [self.tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])]
        return sorted({i for i in candidates if isinstance(i, int) and i < len(self.tokenizer)})

    @property
    def pad_id(self) -> int:
        """Id that fills padding (always masked)."""
        return cast(int, self.tokenizer.pad_token_id)

    @property
    def environment(self) -> Environment:
        """The datamodule's environment. Raises ``TypeError`` where it offers none."""
        environment = getattr(self._datamodule(), "environment", None)
        if not isinstance(environment, Environment):
            raise TypeError(
                f"{type(self._datamodule()).__name__} offers no environment that grades completions; use a datamodule that does."
            )
        return environment

    def configure_optimizers(self) -> Any:
        """AdamW on the trainable parameters, with the configured warm-up and schedule per optimizer step."""
        optimizer = AdamW(self.trainable_parameters(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        scheduler = LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def encode_prompt(self, prompt: str | Chat) -> tuple[int, ...]:
        """Token ids of a prompt; chat messages go through the tokenizer's template, with its thinking mode off."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer(prompt)["input_ids"])
        text = self.render_prompt(prompt)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def render_prompt(self, prompt: str | Chat) -> str:
        """The text of a prompt. Raises ``ValueError`` for chat messages and a tokenizer without a template."""
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "The prompts are chat messages but the tokenizer has no chat template; use an instruction-tuned policy's tokenizer."
            )
        return cast(str, self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, enable_thinking=False))

    def encode(self, prompt: str | Chat, completion: str) -> TokenSequence:
        """Token ids of a prompt and a completion, end token included."""
        ids = cast(list[int], self.tokenizer(completion, add_special_tokens=False)["input_ids"])
        return TokenSequence(self.encode_prompt(prompt), (*ids, cast(int, self.tokenizer.eos_token_id)))

    def completion_log_probs(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        """Differentiable log-probabilities at the training temperature and their mask, both (B, T)."""
        return self._log_probs(self.causal_lm, sequences)

    def _log_probs(self, model: nn.Module, sequences: Sequence[TokenSequence], temperature: float | None = None) -> tuple[Tensor, Tensor]:
        temperature = self.sampling.temperature if temperature is None else temperature
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        if self.shared_prefix and not self.in_shards and not recompute:  # in shards, all ranks make as many passes; this path, one or two
            return shared_prefix_log_probs(model, sequences, self.pad_id, self.device, temperature)
        batch = pad_sequences(sequences, self.pad_id, self.device)
        with recomputing(model) if recompute else nullcontext():
            return completion_log_probs(model, batch, temperature), batch.mask

    def completion_states(self, sequences: Sequence[TokenSequence], layer: int) -> tuple[Tensor, Tensor]:
        """States after decoder layer ``layer`` (B, T, d) and the completion mask (B, T), without gradient."""
        batch = pad_sequences(sequences, self.pad_id, self.device)
        with self.whole_weights():
            return completion_states(self.causal_lm, batch, layer), batch.mask

    def sample(
        self, rows: Sequence[Any], n: int, sampling: Sampling, *purpose: int | str
    ) -> tuple[list[tuple[int, ...]], list[list[Sample]]]:
        """Prompt ids and ``n`` completions per row; seeds are a function of (run seed, purpose, problem, sample)."""
        prompts = [self.encode_prompt(row.prompt) for row in rows]
        seeds = sample_seeds(self.run_seed, rows, n, *purpose)
        return prompts, on_every_rank(lambda: self.engine.generate(prompts, sampling, seeds))

    def complete(self, prompts: Sequence[str | Chat], n: int, seed: int, greedy: bool = False) -> list[list[str]]:
        """``n`` completions of every prompt, drawn as in evaluation, or greedily; a function of prompt, seed and weights.

        The sampler is given the weights as they are now, so all ranks must call it.
        """
        sampling = replace(self.eval_sampling, top_k=1) if greedy else self.eval_sampling
        seeds = [[derive_seed(seed, "completion", p, i) for i in range(n)] for p in range(len(prompts))]
        with self.whole_weights():
            self.engine.onload()
            self.engine.sync(self.trainer.global_step)
            groups = self.engine.generate([self.encode_prompt(prompt) for prompt in prompts], sampling, seeds)
            self.engine.offload()
        return [[self.decode(sample.ids) for sample in group] for group in groups]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion without special tokens."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def base_log_probs(self, sequences: Sequence[TokenSequence], temperature: float) -> Tensor:
        """(B, T) log-probabilities, without gradient, under the policy that training began with: adapter off, or the frozen copy."""
        with torch.no_grad():
            if self.lora is not None:
                with cast(Any, self.causal_lm).disable_adapter():
                    return self._log_probs(self.causal_lm, sequences, temperature)[0]
            reference = self._reference[0] if self._sharded else self._reference[0].to(self.device)
            return self._log_probs(reference, sequences, temperature)[0]

    # ------------------------------------------------------------------ held-out evaluation

    def on_validation_epoch_start(self) -> None:
        """Forget earlier evaluations."""
        self.gather_weights()
        self._evaluation = HeldOutEvaluation(self)
        self.engine.sync(self.trainer.global_step)

    def on_test_epoch_start(self) -> None:
        """Forget earlier evaluations."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: list[Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample and grade held-out problems; ``batch`` may be empty on a rank that has run out of rows."""
        self._evaluation.step(batch, dataloader_idx, self.eval_samples, self.eval_sampling, self.eval_drift)

    def test_step(self, batch: list[Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As ``validation_step``, as the final protocol samples."""
        self._evaluation.step(batch, dataloader_idx, self.test_samples, self.test_sampling, self.eval_drift)

    def on_validation_epoch_end(self) -> None:
        """Log rates over all ranks and write the completions."""
        self.engine.offload()
        self._evaluation.report("val", getattr(self._datamodule(), "val_names", None))
        self.release_weights()

    def on_test_epoch_end(self) -> None:
        """Log rates over all ranks and write the completions."""
        self._evaluation.report("test", getattr(self._datamodule(), "test_names", None))
        self.release_weights()

    def on_train_end(self) -> None:
        """Export the policy."""
        if self.export and not self.trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            export_policy(self, Path(self.trainer.default_root_dir) / "policy")

    def teardown(self, stage: str) -> None:
        """Release the sampler."""
        self.engine.teardown()
