"""What only the study of pairs reads of a configuration: the grid, how masks are learned, how targets are tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwm_fast.errors import InputError
from dwm_fast.methods import Method, TrainOptions, pair_methods
from dwm_fast.pacs.config_values import method_options, named, replace

METHODS = ("none", "naive", "edit", "binary")
"""What the study runs by default; registered methods are offered beside them."""
ENTRIES = ("sources", "targets", "inits", "edit", "binary", "pairwise", "tune", "tune_size", "tune_scale")
"""Entries that only the study of pairs reads."""

Tunes = Mapping[str, tuple[TrainOptions, ...]]
"""Method -> the ways in which it is fine-tuned on the target."""


Options = Mapping[str, Mapping[str, Any]]
"""Method -> options in place of its own defaults."""


def offered() -> tuple[str, ...]:
    """Every method of pairs by name."""
    return (*METHODS, *pair_methods())


def ways_of(tunes: Tunes, method: str) -> tuple[TrainOptions, ...]:
    """The ways a method is fine-tuned; one without its own is fine-tuned as `binary`, which freezes weights too."""
    return tunes.get(method, tunes["binary"])


def with_options(name: str, options: Options | None) -> Method:
    """A registered method by name, with its entry of `options`."""
    method: Method = replace(f"pairwise.{name}", (options or {}).get(name, {}), named("pairwise", name, pair_methods()))
    return method


def read_options(value: Any, old: Options | None) -> Options | None:
    """`old` with the sections of `value` put over it."""
    return None if value is None else method_options("pairwise", value, old or {}, pair_methods())


def check_ways(tunes: Tunes) -> None:
    """Raise InputError where two ways of a method could not be told apart in the results, or pull what is not kept."""
    pulled = next((way.kept_decay for way in tunes.get("none", ()) if way.kept_decay is not None), None)
    if pulled is not None:
        raise InputError(
            f"tune.none: kept_decay is {pulled}; expected none: plain fine-tuning keeps nothing; start_decay pulls all"
        )
    for method, ways in tunes.items():
        if len({(way.batch_norm, f"{way.lr:g}", way.kept_decay) for way in ways}) < max(1, len(ways)):
            raise InputError(
                f"tune.{method} has {len(ways)} ways; expected at least one, and no two with the same batch_norm, "
                "lr and kept_decay, by which results name them"
            )


def read_tunes(value: Any, old: Tunes) -> Tunes:
    """`old` with the sections of `value` in place of a method's ways: one section, or a list of them."""
    if not isinstance(value, Mapping):
        raise InputError("config: tune: expected a section for each method, such as 'binary: {lr: 0.0003}'")
    read = dict(old)
    for method, given in value.items():
        if method not in offered():
            raise InputError(f"config: tune: unknown method '{method}'; expected some of {', '.join(offered())}")
        entries = given if isinstance(given, list) else [given]
        read[method] = tuple(replace(f"tune.{method}", entry, ways_of(old, method)[0]) for entry in entries)
    return read
