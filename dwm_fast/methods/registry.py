"""Every method by the name that tables and the command line use: the library's, and those registered from outside."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import re
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from dwm_fast.errors import InputError
from dwm_fast.methods.cpg import CPG
from dwm_fast.methods.dwm_sequence import BinarySequence
from dwm_fast.methods.fggm import FGGM
from dwm_fast.methods.fine_tuning import FineTuning
from dwm_fast.methods.hat import HAT
from dwm_fast.methods.ksm import KSM, KSM_PAPER
from dwm_fast.methods.lottery import LotteryTicket
from dwm_fast.methods.low_rank import LowRank
from dwm_fast.methods.packnet import PACKNET_PAPER, PackNet
from dwm_fast.methods.piggyback import PIGGYBACK_PAPER, Piggyback
from dwm_fast.methods.sequence import SequentialMethod
from dwm_fast.methods.spg import SPG, SPG_PAPER
from dwm_fast.methods.top_scores import TopScores

GROUP = "dwm_fast.methods"
"""Entry-point group in which a package offers its methods."""
PAIRS = ("none", "naive", "edit", "binary")
"""Names of the pairs' methods that have settings of their own in a study's configuration."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_registered: dict[str, Any] = {}

Given = TypeVar("Given")


def sequential_methods() -> dict[str, SequentialMethod]:
    """Name -> method with our defaults, for a few epochs a task at batches of 32; registered ones at the end."""
    return {**_of_the_library(), **_outside("learner")}


def pair_methods() -> dict[str, Any]:
    """Name -> method of pairs beside `PAIRS`, which are made of a study's configuration; registered ones at the end."""
    methods = (FGGM(), LotteryTicket(), LowRank())
    return {**{method.name: method for method in methods}, **_outside("find")}


def presets() -> dict[str, SequentialMethod]:
    """Preset name -> method with the authors' constants."""
    return {
        "piggyback-paper": PIGGYBACK_PAPER,
        "ksm-paper": KSM_PAPER,
        "spg-paper": SPG_PAPER,
        "packnet-paper": PACKNET_PAPER,
    }


def register_method(method: Given) -> Given:
    """Make a method of your own one that studies, their configurations and `--methods` know by its `name`.

    Args:
        method: a frozen dataclass, its fields the method's options, or an object of one. It has a `name` (letters,
            digits, "-", "_", "."), and `find(model, task)` as a `Method` of pairs, or `learner(network, head)` as a
            `SequentialMethod`, or both. A class is made an object without arguments.

    Returns:
        What was given, so that it decorates a class.

    Raises:
        InputError: no dataclass, no name, neither function, or a name that the library or another class has.

    Example:
        >>> from dataclasses import dataclass
        >>> from dwm_fast.methods import FoundMask, register_method
        >>> @register_method
        ... @dataclass(frozen=True)
        ... class Everything:
        ...     name = "everything"
        ...     def find(self, model, task):
        ...         return FoundMask(None)
    """
    made = method() if isinstance(method, type) else method
    kind = type(made)
    if not dataclasses.is_dataclass(made):
        raise InputError(
            f"{kind.__name__} is no dataclass; write @dataclass(frozen=True) above it: its fields are options"
        )
    name = getattr(made, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"{kind.__name__}.name is {name!r}; expected letters, digits, '-', '_' and '.', for tables and files"
        )
    if not any(callable(getattr(made, way, None)) for way in ("find", "learner")):
        raise InputError(
            f"{kind.__name__} has neither find(model, task), for pairs, nor learner(network, head), for sequences"
        )
    if name in {*PAIRS, *_of_the_library(), *presets()}:
        raise InputError(f"{kind.__name__}.name is '{name}', a method of the library; choose another")
    other = type(_registered.get(name, made))
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise InputError(f"{kind.__name__}.name is '{name}', as of {other.__module__}.{other.__name__}; choose another")
    _registered[name] = made
    return method


@functools.cache
def load_method(reference: str) -> str:
    """Register the class that "path/to/file.py:Class" or "package.module:Class" names; the method's name.

    Raises InputError where there is no such file, module or class, and for what `register_method` refuses.
    """
    place, _, attribute = reference.rpartition(":")
    if not place or not attribute:
        raise InputError(f"method '{reference}'; expected a file and a class, such as fggm.py:FGGM")
    module = _file(Path(place).expanduser()) if place.endswith(".py") else _module(place)
    found = getattr(module, attribute, None)
    if found is None:
        classes = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and (hasattr(value, "find") or hasattr(value, "learner"))
        ]
        raise InputError(f"{place} has no {attribute}; it has {', '.join(classes) or 'no method'}")
    register_method(found)
    return str(found.name)


def _file(path: Path) -> Any:
    """The module that a file is."""
    if not path.is_file():
        raise InputError(f"method file {path}: no such file")
    name = f"dwm_fast_method_{re.sub(r'[^0-9A-Za-z]', '_', str(path.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"method file {path}: {type(error).__name__}: {error}") from error
    return module


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(f"method module {name}: {type(error).__name__}: {error}") from error


def _of_the_library() -> dict[str, SequentialMethod]:
    methods: list[SequentialMethod] = [FineTuning(), Piggyback(), KSM(), SPG(), PackNet(), BinarySequence()]
    methods += [HAT(), TopScores(), FGGM(), CPG(), LowRank()]
    return {method.name: method for method in methods}


def _outside(way: str) -> dict[str, Any]:
    """Registered methods that have the function `way`, those of installed packages among them."""
    _load_entry_points()
    return {name: method for name, method in _registered.items() if hasattr(method, way)}


@functools.cache
def _load_entry_points() -> None:
    """Register what installed packages offer, once; one that fails is left out with a warning."""
    for entry in entry_points(group=GROUP):
        try:
            register_method(entry.load())
        except Exception as error:
            warnings.warn(
                f"dwm_fast: method '{entry.name}' of {entry.value} is left out: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=4,
            )
