"""Values of a configuration as files and flags give them: read, typed, put over defaults, or named as wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from dwm_fast.errors import InputError

_LARGEST = 1 << 20
"""Bytes of the largest file of settings that is read."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for more text than memory holds, or for themselves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"'*{event.anchor}' is an alias; write out what it stands for")
        return super().compose_node(parent, index)


def read_file(path: Path) -> Mapping[str, Any]:
    """The entries of a .toml, .yaml or .json file, with or without a byte order mark."""
    readers = {".toml": tomllib.loads, ".json": json.loads}
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > _LARGEST:
        raise InputError(f"config: {path} is larger than {_LARGEST:,} bytes; expected a file of settings")
    try:
        read = readers.get(path.suffix, lambda text: yaml.load(text, _PlainLoader))
        data = read(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise InputError(f"config: {path} is nested too deeply; expected entries such as 'seeds: [0, 1, 2]'") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"config: {path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise InputError(f"config: {path} holds {type(data).__name__}; expected entries such as 'seeds: [0, 1, 2]'")
    return data


def replace(key: str, value: Any, old: Any) -> Any:
    """The dataclass `old` with the entries of `value` in place of its own, nested dataclasses alike."""
    types = get_type_hints(type(old))
    hints = {field.name: types[field.name] for field in dataclasses.fields(old)}
    if not isinstance(value, Mapping):
        raise InputError(f"config: {key} is {_SHORT.repr(value)}; expected a section with some of {', '.join(hints)}")
    for name in value:
        if name not in hints:
            raise InputError(f"config: {key}: unknown entry '{name}'; expected some of {', '.join(hints)}")
    changes = {
        name: replace(f"{key}.{name}", given, getattr(old, name))
        if dataclasses.is_dataclass(getattr(old, name))
        else typed(f"{key}.{name}", given, hints[name])
        for name, given in value.items()
    }
    try:
        return dataclasses.replace(old, **changes)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def method_options(
    section: str, value: Any, old: Mapping[str, Mapping[str, Any]], known: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """`old` with a section for each method in `value`, typed, put over it; the methods are those of `known`."""
    if not isinstance(value, Mapping):
        example = next(iter(known), "method")
        raise InputError(f"config: {section}: expected a section for each method, such as '{example}: {{epochs: 3}}'")
    read = dict(old)
    for name, given in value.items():
        method = replace(f"{section}.{name}", given, named(section, name, known))
        read[name] = merged(old.get(name, {}), _given(dataclasses.asdict(method), given))
    return read


def named(section: str, name: str, known: Mapping[str, Any]) -> Any:
    """The method of that name; InputError for an unknown one."""
    if name not in known:
        raise InputError(f"config: {section}: unknown method '{name}'; expected some of {', '.join(known)}")
    return known[name]


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options with those of `new` in place of the old."""
    deeper = {k: merged(old[k], v) for k, v in new.items() if isinstance(v, Mapping) and k in old}
    return {**old, **new, **deeper}


def _given(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of nested `options` that `given` names."""
    return {
        name: _given(options[name], value) if isinstance(options[name], dict) else options[name]
        for name, value in given.items()
    }


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type an option has. Numbers may come as text: YAML reads 3e-4 as text."""
    kinds = set(get_args(hint)) or {hint}
    if value is None and type(None) in kinds:
        return None
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"config: {name} is {_SHORT.repr(value)}; expected a list")
        return tuple(typed(name, element, get_args(hint)[0]) for element in value)
    if bool in kinds and not isinstance(value, bool):
        raise InputError(f"config: {name} is {_SHORT.repr(value)}; expected true or false")
    if int in kinds or float in kinds:
        return _number(name, value, whole=int in kinds)
    if str in kinds and get_origin(hint) is not Sequence and not isinstance(value, str):
        raise InputError(f"config: {name} is {_SHORT.repr(value)}; expected text")
    return tuple(value) if isinstance(value, list) else value


def _number(name: str, value: Any, whole: bool) -> float | int:
    if whole and isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (whole and not number.is_integer()):
        raise InputError(f"config: {name} is {_SHORT.repr(value)}; expected a {'whole ' if whole else ''}number")
    return int(number) if whole else number


def sequence(value: Any) -> Sequence[Any]:
    """A list, or text with commas, as a list; anything else as the only element of one."""
    if isinstance(value, str):
        return [v.strip() for v in value.split(",") if v.strip()]
    return value if isinstance(value, (list, tuple)) else [value]
