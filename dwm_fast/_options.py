"""Options as dataclasses whose annotations say which values are right: one check, one wording, for all of them.

    lr: Annotated[float, RATE] = 1e-3

and ``check_options(self)`` in ``__post_init__``: ``lr is -1.0; expected a rate above 0``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dwm_fast.errors import InputError


@dataclass(frozen=True)
class Rule:
    """What an option's value has to be: in words, and as a test. None and what is not finite never reach the test."""

    wanted: str
    fits: Callable[[Any], bool]


def at_least(low: float, what: str = "a number") -> Rule:
    """A number that may be `low`."""
    return Rule(f"{what} of at least {low:g}", lambda value: value >= low)


def above(low: float, what: str = "a number", more: str = "") -> Rule:
    """A number that may not be `low`."""
    return Rule(f"{what} above {low:g}{more}", lambda value: value > low)


def whole(low: int) -> Rule:
    """A whole number that may be `low`."""
    return Rule(f"a whole number of at least {low}", lambda value: value >= low and value == int(value))


EPOCHS = whole(0)
RATE = above(0, "a rate")
FRACTION = Rule("a fraction between 0 and 1", lambda value: 0 < value < 1)
AREA = Rule("a fraction of the area above 0 and up to 1", lambda value: 0 < value <= 1)


def check_options(options: Any, says: str = "{name} is {shown}; expected {wanted}") -> None:
    """Raise InputError for the first field of a dataclass that breaks the `Rule` its annotation carries.

    A number that is not finite breaks every rule; None is right wherever its type allows it.

    Args:
        options: a dataclass; its fields are annotated as ``Annotated[type, Rule]`` or with a Literal, which is a rule
            too; those annotated in another way are not looked at.
        says: the error, with the places `name`, `value` (`shown`: words in quotes) and `wanted`.
    """
    for name, rule in _rules(options.__class__):
        value = getattr(options, name)
        finite = not isinstance(value, float) or math.isfinite(value)
        if value is not None and not (finite and rule.fits(value)):
            shown = f"'{value}'" if isinstance(value, str) else value
            raise InputError(says.format(name=name, value=value, shown=shown, wanted=rule.wanted))


def recorded(options: Any) -> Any:
    """A dataclass, and those in its containers, as plain data: what stages and files of settings record.

    A field with ``metadata={"later": True}`` came after stages had been recorded without it: it is left out while it
    has its default, so that those stages go on being found.
    """
    if dataclasses.is_dataclass(options):
        named = ((field, getattr(options, field.name)) for field in dataclasses.fields(options))
        return {f.name: recorded(v) for f, v in named if not (f.metadata.get("later") and v == f.default)}
    if isinstance(options, Mapping):
        return {key: recorded(value) for key, value in options.items()}
    return [recorded(value) for value in options] if isinstance(options, (list, tuple)) else options


@functools.cache
def _rules(kind: type) -> tuple[tuple[str, Rule], ...]:
    """(name, rule) of every field that has one, in order."""
    found = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        found += [(name, rule) for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, Rule)]
        if get_origin(hint) is Literal:
            words = get_args(hint)
            found.append((name, Rule(f"one of {', '.join(words)}", words.__contains__)))
    return tuple(found)
