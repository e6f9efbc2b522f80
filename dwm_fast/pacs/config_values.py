"""Values of a configuration as files and flags give them: read, typed, put over defaults, or named as wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from dwm_fast.errors import InputError


def read_file(path: Path) -> Mapping[str, Any]:
    """The entries of a .toml, .yaml or .json file."""
    readers = {".toml": tomllib.loads, ".json": json.loads}
    try:
        data = readers.get(path.suffix, yaml.safe_load)(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"config: cannot read {path}: {error.strerror}") from error
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
        raise InputError(f"config: {key} is {value!r}; expected a section with some of {', '.join(hints)}")
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


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type an option has. Numbers may come as text: YAML reads 3e-4 as text."""
    kinds = set(get_args(hint)) or {hint}
    if value is None and type(None) in kinds:
        return None
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"config: {name} is {value!r}; expected a list")
        return tuple(typed(name, element, get_args(hint)[0]) for element in value)
    if bool in kinds and not isinstance(value, bool):
        raise InputError(f"config: {name} is {value!r}; expected true or false")
    if int in kinds or float in kinds:
        return _number(name, value, whole=int in kinds)
    if str in kinds and get_origin(hint) is not Sequence and not isinstance(value, str):
        raise InputError(f"config: {name} is {value!r}; expected text")
    return tuple(value) if isinstance(value, list) else value


def _number(name: str, value: Any, whole: bool) -> float | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value if whole else float(value)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or (whole and not number.is_integer()):
        raise InputError(f"config: {name} is {value!r}; expected a {'whole ' if whole else ''}number")
    return int(number) if whole else number


def sequence(value: Any) -> Sequence[Any]:
    """A list, or text with commas, as a list; anything else as the only element of one."""
    if isinstance(value, str):
        return [v.strip() for v in value.split(",") if v.strip()]
    return value if isinstance(value, (list, tuple)) else [value]
