"""What the rooms know of each other: plain data and protocols, nothing else.

``lightning_modules``, ``datamodules`` and ``callbacks`` never import one another. They meet in a config and talk through the types
in this file:

* a datamodule yields lists of :class:`PromptRow` and offers an :class:`Environment` that grades completions;
* a :class:`Grade` has two halves that never mix: :class:`Reward` (what training may see) and :class:`Verdict` (the oracle);
* a policy module hands every window of rollouts to the callbacks as a :class:`Window`, through the hooks of :class:`WindowHooks`;
* a module that reconstructs a target model from masked parts offers :class:`MaskedReconstruction`, and an adversary can attack it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, runtime_checkable

import torch
from torch import Tensor, nn

Chat: TypeAlias = list[dict[str, str]]
"""Chat messages, each ``{"role": ..., "content": ...}``."""

Label: TypeAlias = Literal["correct", "correct_attempted_hack", "reward_hack", "attempted_hack", "incorrect", "ungraded"]
"""What the oracle calls a completion. ``ungraded`` means the infrastructure failed: never an answer, never in a rate."""


@runtime_checkable
class PromptRow(Protocol):
    """One problem as a policy sees it. Datamodules add whatever fields grading needs."""

    @property
    def id(self) -> str:
        """Stable name of the problem; sampling seeds and reports are keyed by it."""
        ...

    @property
    def prompt(self) -> str | Chat:
        """Raw text, or chat messages that the policy's chat template turns into text."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """One demonstration for supervised fine-tuning.

    Attributes:
        id: Stable name.
        prompt: Raw text, or chat messages, as in :class:`PromptRow`.
        completion: The text to learn.
    """

    id: str
    prompt: str | Chat
    completion: str


@dataclass(frozen=True, slots=True)
class Reward:
    """The half of a grade that training may see; a loophole pays here.

    Attributes:
        value: The scalar reward, or NaN when the infrastructure failed (such a sample gets no advantage).
        passed: The check that training relies on was satisfied, honestly or not.
        compiles: The program compiles.
        parts: Named components, where a reward has several; NaN = this one could not be scored.
    """

    value: float
    passed: bool
    compiles: bool
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The half of a grade that only measurements may see: the oracle's finding.

    Attributes:
        correct: Every hidden test passes, decided outside the process that ran the program.
        label: See :data:`Label`.
        status: How the program ended: ``ok``, ``syntax_error``, ``runtime_error``, ``timeout``, ``infra_error``, ...
        overrides: The program defines the evaluator's function itself.
    """

    correct: bool
    label: Label
    status: str
    overrides: bool

    @property
    def hack(self) -> bool:
        """Rewarded although wrong (the strict hack label)."""
        return self.label == "reward_hack"

    @property
    def loose_hack(self) -> bool:
        """A hack, or an attempt at one: an evaluator of its own that cannot tell right from wrong (the loose hack label)."""
        return self.label in ("reward_hack", "attempted_hack", "correct_attempted_hack")


@dataclass(frozen=True, slots=True)
class Grade:
    """Both halves of the judgement on one completion."""

    reward: Reward
    verdict: Verdict


@runtime_checkable
class Environment(Protocol):
    """Grades completions of rows. Offered by a datamodule as its ``environment`` attribute."""

    def start(self) -> None:
        """Acquire workers and run the self-check; idempotent. Raises ``RuntimeError`` when grading cannot be trusted."""
        ...

    def grade(self, rows: Sequence[Any], completions: Sequence[str]) -> list[Grade]:
        """Grade ``completions[i]`` as an answer to ``rows[i]``; order is kept, nothing is dropped."""
        ...

    def close(self) -> None:
        """Release workers; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class ContrastPair:
    """One prompt with a completion that shows the concept and one that does not.

    Attributes:
        prompt: Prompt text or chat messages, as in :class:`PromptRow`.
        concept: Completion text that shows the unwanted behaviour (a hack).
        clean: Completion text that does not.
    """

    prompt: str | Chat
    concept: str
    clean: str


@runtime_checkable
class PairSource(Protocol):
    """A datamodule that can make contrastive pairs for its own task."""

    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        """``n`` pairs, a function of ``seed`` alone."""
        ...


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and a completion in token ids (the completion includes its end token when it has one)."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


@runtime_checkable
class SequenceScorer(Protocol):
    """A module that can score token sequences under its current weights. Callbacks need no more of a policy."""

    def encode(self, prompt: str | Chat, completion: str) -> TokenSequence:
        """Tokenise a pair of texts as training would, end token included."""
        ...

    def completion_log_probs(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        """Differentiable log-probabilities and their mask, both (B, T) over completion tokens, padding 0."""
        ...

    def completion_states(self, sequences: Sequence[TokenSequence], layer: int) -> tuple[Tensor, Tensor]:
        """Residual-stream states after decoder layer ``layer`` (B, T, d) and their completion mask (B, T), without gradient."""
        ...


@runtime_checkable
class Completer(Protocol):
    """A module that can complete prompts under its current weights."""

    def complete(self, prompts: Sequence[str | Chat], n: int, seed: int, greedy: bool = False) -> list[list[str]]:
        """``n`` completions of every prompt; a function of prompt, seed and weights."""
        ...


@dataclass(slots=True)
class Rollout:
    """One sampled completion.

    Attributes:
        tokens: Prompt and completion ids exactly as sampled (never re-tokenised).
        text: The decoded completion without special tokens.
        sampler_log_probs: Log-probability of each completion token when it was sampled, after temperature.
        finish: ``stop`` (an end token was sampled) or ``length``.
        problem: The row's id.
        slot: Position of the prompt in the *global* batch of the window, the same whatever the number of ranks.
        sample: Index within the group.
        weight_version: Number of optimizer steps that the sampling weights had seen.
        source: ``policy``, or the name of whatever else wrote it.
    """

    tokens: TokenSequence
    text: str
    sampler_log_probs: tuple[float, ...]
    finish: Literal["stop", "length"]
    problem: str
    slot: int
    sample: int
    weight_version: int
    source: str = "policy"


@dataclass(slots=True)
class Window:
    """Everything between two optimizer steps, as this rank sees it. Groups are contiguous.

    Attributes:
        step: Optimizer steps taken before this window.
        rows: The rank's prompts, one per group.
        rollouts: ``len(rows) * group_size`` rollouts, group after group.
        rewards: One per rollout.
        group_size: Completions per prompt.
        values: (n,) float64 reward values; callbacks may change them in ``on_rollouts``. NaN = not scorable.
        advantages: (n,) advantages, or (n, T) with column t for completion token t; callbacks may change them in ``on_advantages``.
        metrics: (sum, count) pairs that callbacks add; the module sums both over ranks and logs the ratio.
        features: (n,) numbers per rollout that callbacks measure, for the gates and reports of later callbacks.
        weights: (n,) or (n, T) factors on the loss, set by callbacks; empty = 1 everywhere. Denominators stay as they are.
        parts: Name of the gradient part that each rollout belongs to, set by callbacks; empty = its source.
    """

    step: int
    rows: list[Any]
    rollouts: list[Rollout]
    rewards: list[Reward]
    group_size: int
    values: Tensor
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    parts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class OracleWindow(Window):
    """A window that also shows the oracle's verdicts: handed only to callbacks that declare ``uses_oracle = True``."""

    verdicts: list[Verdict] = field(default_factory=list)


class WindowHooks(Protocol):
    """The hooks of a policy-gradient window, in the order they are called. Each is optional for a callback.

    Lightning's own ``on_before_optimizer_step`` fires between ``on_microbatch_gradients`` and ``on_after_optimizer_step``: gradients
    are then accumulated, summed over ranks and not yet clipped. Clipping follows it, then the step.
    """

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
        """Rollouts are graded; ``window.values`` may be changed."""

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        """Advantages are computed; ``window.advantages`` may be changed."""

    def on_microbatch_gradients(self, trainer: Any, pl_module: Any, window: Window, part: str) -> None:
        """One microbatch of gradient part ``part`` has been added to ``p.grad`` (local to this rank)."""

    def on_part_gradients(self, trainer: Any, pl_module: Any, window: Window, part: str) -> None:
        """``p.grad`` holds part ``part`` alone, summed over ranks, and may be changed; the parts are added afterwards.

        Called for every part of the window, in the order of their names, on every rank.
        """

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The optimizer has stepped; the applied update is known."""


@runtime_checkable
class MaskedReconstruction(Protocol):
    """A module whose reconstruction of a target an adversary can attack through *sources*.

    A source is a number in [0, 1] per channel; the module turns sources into the masks they allow (for a decomposition with causal
    importance g, the mask ``g + (1 - g) * source``, and the mask of the delta component is its source itself). What the channels are
    is the module's own affair.
    """

    def leading_shape(self, batch: Any) -> tuple[int, ...]:
        """Shape of the batch without channels: ``(rows,)`` or ``(rows, positions)``. Rows are the first axis of every tensor in it."""
        ...

    def source_channels(self) -> dict[str, int]:
        """Number of source channels by site, in a fixed order: the components C, or C + 1 where a delta component comes last."""
        ...

    def prepare(self, batch: Any) -> Any:
        """What every step of an attack on ``batch`` shares, without graph: target output, causal importances. Draws no random number."""
        ...

    def loss_sum(self, prepared: Any, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Summed reconstruction loss under ``sources``, and the count it is a sum over.

        Differentiable in the sources, without side effect, and in the module's own precision.

        Args:
            prepared: From :meth:`prepare`.
            sources: By site, each broadcastable to ``(*leading_shape, channels)``.

        Returns:
            A scalar sum (KL over positions, or squared error over elements) and the count (positions, or elements).
        """
        ...


@dataclass(slots=True)
class ActivationRows:
    """Rows of an activation bank: what a talkative autoencoder is trained on and measured with.

    Attributes:
        ids: ``"<document>:<position>"``, the same in every subset of the bank and on every rank.
        documents: Each row's document: rows of one document are not independent.
        activations: (R, d) in the producer's own units, never normalised.
        texts: Captions or token contexts where the source has some, else empty strings.
    """

    ids: tuple[str, ...]
    documents: tuple[str, ...]
    activations: Tensor
    texts: tuple[str, ...]


@runtime_checkable
class Verbaliser(Protocol):
    """Turns activations into texts.

    Randomness is counter-based: the text of a (row id, candidate index, temperature, seed) depends on no other row, on no other candidate
    and on no batch or rank, up to float noise in the logits. So candidates can be drawn in any order and extended later.
    """

    def describe(
        self, activations: Tensor, ids: Sequence[str], candidates: range, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[str]]:
        """One text per row and candidate index.

        Args:
            activations: (R, d) in the producer's units.
            ids: R row ids; with the candidate index and the seed they name a random stream.
            candidates: Indices to draw, for example ``range(8, 16)`` after ``range(8)``.
            temperature: Divides the logits; 0 is greedy decoding (every candidate is then the same text).
            max_new_tokens: Longest text, end token included.
            seed: Of the run.

        Returns:
            R lists of ``len(candidates)`` texts; an empty text says that nothing usable was written.
        """
        ...

    def fingerprint(self) -> str:
        """Content hash of all that decides the texts: weights, prompt, tokenizer, how the activation is put in."""
        ...


@runtime_checkable
class Reconstructor(Protocol):
    """Turns texts back into activations."""

    def reconstruct(self, texts: Sequence[str]) -> Tensor:
        """(R, d) reconstructions in the producer's units, without gradient; each depends on its own text alone, up to float noise."""
        ...

    def fingerprint(self) -> str:
        """Content hash of all that decides the reconstructions."""
        ...


@runtime_checkable
class TalkativeAutoencoder(Verbaliser, Protocol):
    """A module that describes activations and has reconstructors to read the descriptions."""

    @property
    def reconstructors(self) -> Mapping[str, Reconstructor]:
        """By name. The first one selects among candidates; the others (held out, never seen in training) only score what it selected."""
        ...


class ActivationBatch(TypedDict):
    """This rank's share of a global batch of paired activations: rows ``r, r + W, ...`` of it on rank r of W.

    Keys:
        input: (B, d_in) at the source site, in the producer's units and dtype, never normalised.
        target: (B, d_out) at the target site, likewise; the same tensor as ``input`` for an autoencoder.
        position: (B,) int64 position of the token in its packed sequence.
        token: (B,) int64 token id.
        row: (B,) int64 number of the token in the stream, ``sequence * length + position``: the same whatever the number of ranks.
    """

    input: Tensor
    target: Tensor
    position: Tensor
    token: Tensor
    row: Tensor


@runtime_checkable
class ActivationSource(Protocol):
    """A datamodule that yields :class:`ActivationBatch`; sizes and sites are known after its constructor."""

    input_site: Any
    """:class:`theodolite.sites.ActivationSite` of ``input``."""
    target_site: Any
    """:class:`theodolite.sites.ActivationSite` of ``target``."""
    global_batch_size: int
    """Rows per training batch over all ranks."""

    @property
    def input_width(self) -> int:
        """d_in, from the model's config: no weights are loaded for it."""
        ...

    @property
    def target_width(self) -> int:
        """d_out, likewise."""
        ...

    @property
    def producer(self) -> nn.Module:
        """The language model, in evaluation mode and without gradients, for evaluations that splice something into it."""
        ...

    def held_out_tokens(self, sequences: int) -> Tensor:
        """(sequences, length) int64 packed token ids of the validation stream, the same on every rank."""
        ...


@runtime_checkable
class ActivationTable(Protocol):
    """Rows of activations in a fixed order: a longer table of the same key begins with the rows of a shorter one."""

    @property
    def key(self) -> Mapping[str, Any]:
        """Plain data that decides every row (model, site, corpus, positions), and not how many there are."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def rows(self, indices: Sequence[int]) -> ActivationRows:
        """Rows by number, in the order asked for."""
        ...


@runtime_checkable
class ActivationTables(Protocol):
    """A datamodule with activations of ``train``, ``validation`` and ``test`` documents, no document in two of them."""

    def table(self, split: str) -> ActivationTable:
        """The rows of a split; made first, by all ranks together, where they are not on disk yet. All ranks must call it."""
        ...


@runtime_checkable
class NestedCoder(Protocol):
    """A sparse coder with nested prefixes, as evaluations see it (:class:`theodolite.lightning_modules.transcoder.Transcoder`)."""

    prefixes: Tensor
    """(G,) int64 ends of the prefixes, the last one all latents."""

    def __call__(self, inputs: Tensor, prefix: int | None = None) -> Tensor:
        """(..., d_in) raw inputs to (..., d_out) reconstructions by one of the prefixes (None = all latents), without gradient."""
        ...

    def encode(self, inputs: Tensor) -> Any:
        """:class:`theodolite.functional.sparse_codes.SparseCodes` of (N, d_in) raw inputs, by the inference rule."""
        ...


@runtime_checkable
class ComponentView(Protocol):
    """A decomposition whose components and causal importances can be looked at."""

    def importances(self, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """By module, (lower causal importances, logits), each (..., C), without graph."""
        ...

    def component_matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By module, V (d_in, C) and U (C, d_out), without graph."""
        ...

    def one_hot_batch(self) -> Tensor | None:
        """Inputs with one active feature each (features, features); None where inputs are not features."""
        ...
