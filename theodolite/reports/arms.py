"""How arms are ordered and drawn. Unknown arms are welcome: they follow the known ones and take the next free colour.

Colours are those of Okabe and Ito (distinguishable with the common colour vision deficiencies), lightened where a dark background needs it;
markers and dashes carry the same information a second time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How one arm is drawn.

    Attributes:
        light: Colour on a light background.
        dark: Colour on a dark background.
        marker: Marker of matplotlib.
        control: Drawn dashed: the arm exists to be compared with.
    """

    light: str
    dark: str
    marker: str
    control: bool


_KNOWN: dict[str, tuple[str, ArmStyle]] = {
    "vanilla": ("no intervention", ArmStyle("#1a1a1a", "#f0f0f0", "o", False)),
    "random": ("Haar-random direction, control", ArmStyle("#8a8a8a", "#9a9a9a", "X", True)),
    "projected_static": ("static direction, one-sided removal, norm restored", ArmStyle("#e69f00", "#e69f00", "s", False)),
    "projected_live": ("live direction, one-sided, overshoot 2", ArmStyle("#d55e00", "#f0742a", "D", False)),
    "shuffled": ("projected_live with shuffled pair labels, control", ArmStyle("#cc79a7", "#dc8fb9", "v", True)),
    "push": ("constant ungated push along the live direction", ArmStyle("#0072b2", "#4ba3dc", "^", True)),
    "rebound": ("activation-score penalty on advantages, baseline", ArmStyle("#009e73", "#1fbf92", "p", False)),
    "projected_live_1": ("live direction, one-sided removal", ArmStyle("#8c6d1f", "#cbb04a", "h", False)),
    "live_probe": ("live pairs by an activation probe, overshoot 2", ArmStyle("#7b5cc4", "#a68bea", "<", False)),
    "live_probe_reference": ("the probe's pairs against reference solutions, overshoot 3", ArmStyle("#882255", "#c9689a", "*", False)),
    "push_probe": ("constant ungated push along the probe's direction", ArmStyle("#56b4e9", "#8fd0f5", ">", True)),
    "oracle": ("reward without the loophole, from the oracle's labels", ArmStyle("#44aa99", "#74cfc1", "P", True)),
}

_SPARE = (
    ("#6a7fdb", "#95a5f0"), ("#b07aa1", "#cf9fc2"), ("#9c755f", "#c39b83"), ("#59a14f", "#86c67c"), ("#b6992d", "#d9c063"),
    ("#e15759", "#f08a8c"), ("#2f6690", "#79a9cf"), ("#7a7a2e", "#b8b85c"), ("#5d3a9b", "#a98be0"),
)  # fmt: skip
_SPARE_MARKERS = "<>h*dPH8"


def known_title(arm: str) -> str:
    """What a known arm is, in words; the empty string for others."""
    return _KNOWN[arm][0] if arm in _KNOWN else ""


def arm_order(arms: Iterable[str]) -> list[str]:
    """Known arms in their usual order, then the others by name."""
    present = set(arms)
    return [arm for arm in _KNOWN if arm in present] + sorted(present - set(_KNOWN))


def arm_styles(arms: Iterable[str], titles: dict[str, str], controls: Collection[str] = ()) -> dict[str, ArmStyle]:
    """A style for every arm, in the order given; unknown arms among ``controls``, or whose title contains ``control``, are dashed."""
    styles: dict[str, ArmStyle] = {}
    spare = 0
    for arm in arms:
        if arm in _KNOWN:
            styles[arm] = _KNOWN[arm][1]
            continue
        light, dark = _SPARE[spare % len(_SPARE)]
        marker = _SPARE_MARKERS[spare % len(_SPARE_MARKERS)]
        styles[arm] = ArmStyle(light, dark, marker, arm in controls or "control" in titles.get(arm, "").lower())
        spare += 1
    return styles
