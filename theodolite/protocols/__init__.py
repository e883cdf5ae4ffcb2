"""What the rooms know of each other: plain data and protocols, nothing else.

``lightning_modules``, ``datamodules`` and ``callbacks`` never import one another. They meet in a config and talk through the types
of this package, each imported as ``from theodolite.protocols import NAME``:

* a datamodule yields lists of :class:`PromptRow` and offers an :class:`Environment` that grades completions;
* a :class:`Grade` has two halves that never mix: :class:`Reward` (what training may see) and :class:`Verdict` (the oracle);
* a policy module hands every window of rollouts to the callbacks as a :class:`Window`, through the hooks of :class:`WindowHooks`;
* a module that reconstructs a target model from masked parts offers :class:`MaskedReconstruction`, and an adversary can attack it;
* an :class:`ActivationSource` feeds sparse coders, and :class:`ActivationTables` feed a :class:`TalkativeAutoencoder`.
"""

from .activations import ActivationBatch, ActivationRows, ActivationSource, ActivationTable, ActivationTables, NestedCoder
from .decomposition import ComponentView, MaskedReconstruction, SlopedReconstruction
from .grades import Environment, Grade, Label, Reward, Verdict
from .policies import (
    Chat,
    Completer,
    ContrastPair,
    Example,
    PairSource,
    PromptPreview,
    PromptReserve,
    PromptRow,
    SequenceScorer,
    TokenSequence,
)
from .talkative import Reconstructor, TalkativeAutoencoder, Verbaliser
from .windows import OracleWindow, Rollout, Window, WindowHooks

__all__ = [
    "ActivationBatch",
    "ActivationRows",
    "ActivationSource",
    "ActivationTable",
    "ActivationTables",
    "Chat",
    "Completer",
    "ComponentView",
    "ContrastPair",
    "Environment",
    "Example",
    "Grade",
    "Label",
    "MaskedReconstruction",
    "NestedCoder",
    "OracleWindow",
    "PairSource",
    "PromptPreview",
    "PromptReserve",
    "PromptRow",
    "Reconstructor",
    "Reward",
    "Rollout",
    "SequenceScorer",
    "SlopedReconstruction",
    "TalkativeAutoencoder",
    "TokenSequence",
    "Verbaliser",
    "Verdict",
    "Window",
    "WindowHooks",
]
