"""The terminal: text from outside is never markup, never a control sequence, and never the end of a run."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

_SPELLED = str.maketrans(
    {"×": "x", "→": "->", "±": "+-", "–": "-", "—": "-", "−": "-", "…": "...", "“": '"', "”": '"', "‘": "'", "’": "'"}
)
_HANDLER = "dwm_fast.spelled"


def plain(text: str) -> str:
    r"""The text with every character that does not print (ESC, BEL, bidi marks, lone surrogates) as an escape.

    >>> plain("a[b]\x1b[31m")
    'a[b]\\x1b[31m'
    """
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text.expandtabs(4)
    )


class Screen(Console):
    """A console on which a string is what it says: brackets, colons and numbers are not looked into."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, alone or in a table, comes through here."""
        return super().render_str(plain(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Whatever else is printed, such as a Text made elsewhere, comes through here in the end."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def accept_any_text() -> None:
    """Let stdout and stderr of any encoding take any text: what they cannot show is spelled, × as x, others as ?."""
    codecs.register_error(_HANDLER, _spell)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end].translate(_SPELLED)
    return "".join(letter if letter.isascii() else "?" for letter in letters), error.end
