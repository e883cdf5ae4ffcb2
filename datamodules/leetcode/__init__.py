"""Programming problems whose tests can be overwritten, and the two graders."""

from typing import TYPE_CHECKING

from theodolite.lazy_names import lazy_names

if TYPE_CHECKING:
    from .datamodule import LeetCodeDataModule
    from .sft import LeetCodeSFTDataModule

__all__ = ["LeetCodeDataModule", "LeetCodeSFTDataModule"]

__getattr__ = lazy_names(__name__, {"LeetCodeDataModule": ".datamodule", "LeetCodeSFTDataModule": ".sft"})
