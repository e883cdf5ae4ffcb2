"""Turns run directories into tables, figures and pages."""

from theodolite.reports.build import build_report

__all__ = ["build_report"]
