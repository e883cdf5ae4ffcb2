"""Text as packed token windows with explicit document boundaries."""

from .token_rows import TokenRowsDataModule

__all__ = ["TokenRowsDataModule"]
