"""The wing of sequences: one backbone learns domain after domain. `SequenceStudy` is its public name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwm_fast.pacs.sequence.study import SequenceStudy

__all__ = ["SequenceStudy"]


def __getattr__(name: str) -> Any:
    """Import the study when it is asked for: the configuration, which it needs, imports this folder."""
    if name == "SequenceStudy":
        from dwm_fast.pacs.sequence.study import SequenceStudy

        return SequenceStudy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
