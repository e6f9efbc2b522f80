"""What only the study of pairs reads of a configuration: the grid, how masks are learned, how targets are tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwm_fast.errors import InputError
from dwm_fast.methods import TrainOptions
from dwm_fast.pacs.config_values import replace

METHODS = ("none", "naive", "edit", "binary")
ENTRIES = ("sources", "targets", "inits", "edit", "binary", "tune", "tune_size", "tune_scale")
"""Entries that only the study of pairs reads."""

Tunes = Mapping[str, tuple[TrainOptions, ...]]
"""Method -> the ways in which it is fine-tuned on the target."""


def check_ways(tunes: Tunes) -> None:
    """Raise InputError where two ways of a method could not be told apart in the results."""
    for method, ways in tunes.items():
        if len({(way.batch_norm, f"{way.lr:g}") for way in ways}) < max(1, len(ways)):
            raise InputError(
                f"tune.{method} has {len(ways)} ways; expected at least one, and no two with the same batch_norm "
                "and lr, by which results name them"
            )


def read_tunes(value: Any, old: Tunes) -> Tunes:
    """`old` with the sections of `value` in place of a method's ways: one section, or a list of them."""
    if not isinstance(value, Mapping):
        raise InputError("config: tune: expected a section for each method, such as 'binary: {lr: 0.0003}'")
    read = dict(old)
    for method, given in value.items():
        if method not in METHODS:
            raise InputError(f"config: tune: unknown method '{method}'; expected some of {', '.join(METHODS)}")
        entries = given if isinstance(given, list) else [given]
        read[method] = tuple(replace(f"tune.{method}", entry, old[method][0]) for entry in entries)
    return read
