"""Programming problems whose tests can be overwritten, and the two graders."""

from .datamodule import LeetCodeDataModule
from .sft import LeetCodeSFTDataModule

__all__ = ["LeetCodeDataModule", "LeetCodeSFTDataModule"]
