"""Numbers as text: rates in percent, differences in percentage points, and a plain remark for what was not measured."""

from __future__ import annotations

import math

from theodolite.functional.statistics import Spread
from theodolite.reports.statistics_table import Comparison

NOT_MEASURED = "not measured"


def percent(value: float | None, digits: int = 1) -> str:
    """A rate in percent, ``12.3 %``, with a space that does not break."""
    return NOT_MEASURED if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def points(value: float | None) -> str:
    """A signed difference of rates in percentage points, ``+12.3``, with a true minus sign below zero."""
    return NOT_MEASURED if value is None else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def mean_and_sd(value: Spread) -> str:
    """``74.0 ± 6.4`` in percent; of a single seed only its value (see :func:`n_remark`)."""
    if value.mean is None:
        return NOT_MEASURED
    if value.sd is None:
        return f"{100 * value.mean:.1f}"
    return f"{100 * value.mean:.1f} ± {100 * value.sd:.1f}"


def n_remark(value: Spread) -> str:
    """Over how many seeds, ``n=3``, and that one has no spread; empty where nothing was measured."""
    return "n=1: no spread" if value.n == 1 else f"n={value.n}" if value.n else ""


def p_text(p_value: float) -> str:
    """``p = 0.012``; of differences that are all equal there is no test."""
    return "no spread" if math.isnan(p_value) else f"p = {p_value:.2g}"


def interval(item: Comparison) -> str:
    """``[+1.0, +3.1]``; empty where there is no interval."""
    return "" if item.low is None or item.high is None else f"[{points(item.low)}, {points(item.high)}]"


def sign_count(item: Comparison) -> str:
    """On how many of the seeds the difference has the sign of its mean: ``lower on 3/3 seeds``."""
    if item.mean is None:
        return item.refusal
    if item.mean == 0:
        return f"equal mean, lower on {item.below}/{item.n} seeds"
    word, count = ("lower", item.below) if item.mean < 0 else ("higher", item.above)
    return f"{word} on {count}/{item.n} seed{'s' if item.n != 1 else ''}"


def duration(seconds: float | None) -> str:
    """``48 s``, ``3 min 20 s`` or ``1 h 5 min``."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def listing(items: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""


def count(value: int | None) -> str:
    """A number of things, thousands set apart."""
    return NOT_MEASURED if value is None else f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
