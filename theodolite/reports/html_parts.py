"""Small pieces of HTML. Every text passes through :func:`inline` or :func:`html.escape`: what a model wrote stays text."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from theodolite.reports.arms import ArmStyle
from theodolite.reports.formatting import NOT_MEASURED

_CODE = re.compile(r"`([^`]+)`")
_TEXT = ' class="text"'


def inline(text: str) -> str:
    """Escaped text in which backticks become code."""
    return _CODE.sub(r"<code>\1</code>", escape(text))


def section(anchor: str, title: str, body: str) -> str:
    """A section with a heading."""
    return f'<section id="{escape(anchor)}">\n<h2>{escape(title)}</h2>\n{body}\n</section>\n'


def cell(text: str, *remarks: str) -> str:
    """A table cell from plain text, with further lines in small print."""
    shown = f'<span class="absent">{escape(text)}</span>' if text == NOT_MEASURED else escape(text)
    return f"<td>{shown}{''.join(f'<small>{escape(remark)}</small>' for remark in remarks if remark)}</td>"


def table(head: Sequence[str], rows: Sequence[str], texts: Sequence[str] = ()) -> str:
    """A table that scrolls sideways on narrow screens; ``rows`` are ready ``<tr>`` elements, columns named in ``texts`` hold no numbers."""
    heads = "".join(f'<th scope="col"{_TEXT if title in texts else ""}>{escape(title)}</th>' for title in head)
    body = "\n".join(rows)
    return f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def swatch(arm: str, style: ArmStyle) -> str:
    """A short line in the arm's colour, dashed for controls."""
    return f'<span class="swatch{" control" if style.control else ""} {arm_class(arm)}"></span>'


def arm_name(arm: str, style: ArmStyle) -> str:
    """The arm's swatch and name, kept on one line."""
    return f'<span class="arm">{swatch(arm, style)}<b>{escape(arm)}</b></span>'


def arm_class(arm: str) -> str:
    """The CSS class that carries an arm's colour."""
    return "arm-" + "".join(letter if letter.isalnum() and letter.isascii() else f"_{ord(letter):x}_" for letter in arm)


def arm_colours(styles: dict[str, ArmStyle]) -> str:
    """CSS that sets each arm's colour for light and dark."""
    light = " ".join(f".{arm_class(arm)} {{ --arm: {style.light}; }}" for arm, style in styles.items())
    dark = " ".join(f".{arm_class(arm)} {{ --arm: {style.dark}; }}" for arm, style in styles.items())
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n"


def data_uri(content: bytes, kind: str) -> str:
    """``content`` as a data URI of media type ``kind``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def code_lines(prompt: str, completion: str, flagged: frozenset[int]) -> str:
    """A prompt and its completion as one block, the flagged lines of the completion marked."""
    lines = completion.split("\n")
    shown = [f"<mark>{escape(line)}</mark>" if index in flagged else escape(line) for index, line in enumerate(lines)]
    return f'<pre><span class="prompt">{escape(prompt)}</span>{chr(10).join(shown)}</pre>'
