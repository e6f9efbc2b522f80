"""Who is at work in a run folder: one process at a stage, one configuration at a time, one study for good."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dwm_fast._files import hold_lock, reason, write_atomic
from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.config import StudyConfig
from dwm_fast.pacs.sequence.config import orders_of

FOLDER = ".locks"
_CONFIG = "study.json"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_PLACES = ("data", "data_root", "splits", "weights", "device")
"""Entries that may differ from machine to machine: stages compare what lies there."""
_GRID = ("sources", "targets", "methods", "inits", "seeds")
"""Entries that may grow while a folder is used."""
_OF_PAIRS, _OF_SEQUENCES = ("mask-", "tune-"), ("sequence-",)
"""How the names of stages begin that one kind of study alone has."""


class Claims:
    """The locks of a run folder. Each ends with the process that holds it, in whatever way that ends.

    They are flock's. On a file system that has none nothing is held, and a stage may be done twice, with equal numbers.

    Args:
        folder: where the files of the locks lie; made when the first is held. They stay when it is given up.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def stage(self, name: str, waits: Callable[[str], object] = lambda _: None) -> Iterator[None]:
        """Hold a stage by name, or wait for it, after `waits(name)`, where another process or thread holds it."""
        with contextlib.ExitStack() as stack:
            if not self._hold(name, stack, wait=False):
                waits(name)
                self._hold(name, stack)
            yield

    def taken(self, name: str) -> bool:
        """Whether somebody is at a stage at this moment."""
        path = self.folder / f"{name}.lock"
        with contextlib.ExitStack() as stack:
            return path.exists() and not hold_lock(path, stack, shared=True, wait=False)

    @contextlib.contextmanager
    def study(self, config: StudyConfig) -> Iterator[None]:
        """Work under a configuration, together with others that have the same.

        Raises InputError, with nothing written, where others are at work under another.
        """
        plain = {key: value for key, value in config.to_dict().items() if key not in _PLACES}
        with contextlib.ExitStack() as stack:
            with contextlib.ExitStack() as gate:
                self._hold("gate", gate)
                with contextlib.ExitStack() as alone:
                    if self._hold("study", alone, wait=False):
                        write_atomic(self.folder / _CONFIG, json.dumps(plain, indent=1))
                there = json.loads((self.folder / _CONFIG).read_text(encoding="utf-8"))
                if there != plain:
                    raise InputError(
                        f"another study is at work in {self.folder.parent} ({', '.join(differences(there, plain))}); "
                        "wait for it, or choose another --out"
                    )
                hold_lock(self.folder / "study.lock", stack, shared=True)
            yield

    def _hold(self, name: str, stack: contextlib.ExitStack, wait: bool = True) -> bool:
        """Whether the lock is held now, until the stack is left; False only without `wait`."""
        path = self.folder / f"{name}.lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return hold_lock(path, stack, wait=wait)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return True
            raise DataError(
                f"cannot write {self.folder.parent}: {reason(error)}; free the disk or choose another folder"
            ) from error


def check_folder(folder: Path, config: StudyConfig) -> None:
    """Raise InputError where a run folder holds a study of the other kind, or results that this one would lose.

    A study may have more sources, targets, methods, inits, seeds, ways, orders, and domains at the end of a
    sequence than the one whose results are there, not fewer.
    """
    kind, other = (_OF_PAIRS, _OF_SEQUENCES) if config.sequence is None else (_OF_SEQUENCES, _OF_PAIRS)
    names = [file.name for file in (folder / "stages").glob("*.safetensors")]
    there, now = _recorded(folder), config.to_dict()
    foreign = next((name for name in names if name.startswith(other)), None)
    if foreign is None and there and (there.get("sequence") is None) != (config.sequence is None):
        foreign = "config.json"
    if foreign is not None:
        kinds = {_OF_PAIRS: "the study of pairs", _OF_SEQUENCES: "a sequence"}
        raise InputError(f"{folder} holds {kinds[other]} ({foreign}), and this is {kinds[kind]}; choose another --out")
    lost = [f"{entry} {', '.join(map(str, values))}" for entry, values in _lost(there, now)]
    if lost:
        raise InputError(
            f"{folder} holds results that this study would leave out ({'; '.join(lost)}); give those too, or choose "
            "another --out"
        )


def _recorded(folder: Path) -> dict[str, Any]:
    """The configuration of the results that are there; {} where there are none."""
    try:
        plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plain if isinstance(plain, dict) and (folder / "results.json").exists() else {}


def _lost(there: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Entries of the grid, and values of theirs, that only the older configuration has."""
    for entry in _GRID:
        gone = [value for value in there.get(entry) or [] if value not in (now.get(entry) or [])]
        if gone:
            yield entry, gone
    new = _orders(now)
    gone = [",".join(old) for old in _orders(there) if not any(order[: len(old)] == old for order in new)]
    if gone:
        yield "sequence", gone
    if there.get("alone") and not now.get("alone"):
        yield "alone", [True]
    for method in there.get("methods") or []:
        kept = _ways(now, method)
        gone = [way for way in _ways(there, method) if way not in kept]
        if gone:
            yield f"tune.{method}", gone


def _orders(plain: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The orders of a sequence in a written configuration; () where it is of pairs."""
    return orders_of(plain["sequence"], plain.get("orders", 1)) if plain.get("sequence") else ()


def _ways(config: Mapping[str, Any], method: str) -> list[str]:
    """The ways in which a method is fine-tuned as results name them; one without its own has those of `binary`."""
    tunes = config.get("tune") or {}
    return [
        f"{way.get('batch_norm')} at lr {way.get('lr')}{_pull(way)}"
        for way in tunes.get(method, tunes.get("binary", []))
    ]


def _pull(way: Mapping[str, Any]) -> str:
    return "" if way.get("kept_decay") is None else f", pull {way['kept_decay']:g}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the entries in which two nested mappings differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} now")
    return found
