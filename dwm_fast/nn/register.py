"""Mask kinds from outside the package."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from dwm_fast.errors import InputError
from dwm_fast.nn.kinds import KINDS, MaskKind

Kind = TypeVar("Kind", bound=type[MaskKind])


def register_kind(kind: Kind) -> Kind:
    """Make a `MaskKind` of your own one that files of `save_masked` and `kind_from_dict` know by its `name`.

    Masked layers learn any MaskKind without this; only reading one back needs it. Returns the class, so that it
    decorates one. Raises InputError for what is no frozen dataclass of MaskKind, has no name, or has one that is taken.
    """
    if not (isinstance(kind, type) and issubclass(kind, MaskKind) and dataclasses.is_dataclass(kind)):
        raise InputError(f"{kind!r} is no mask kind; expected a class @dataclass(frozen=True) that inherits MaskKind")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name:
        raise InputError(f"{kind.__name__}.name is {name!r}; expected the name that files know it by")
    other = KINDS.get(name, kind)
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise InputError(f"{kind.__name__}.name is '{name}', as of {other.__module__}.{other.__name__}; choose another")
    KINDS[name] = kind
    return kind
