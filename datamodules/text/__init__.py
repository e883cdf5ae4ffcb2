"""Text as packed token windows with explicit document boundaries."""
