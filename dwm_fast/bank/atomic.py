"""A folder whose files change together: all or none by a journal, under a lock that readers share."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from dwm_fast._files import PART, drop_part, hold_lock, reason, sync_folder, write_part
from dwm_fast.bank.header import open_regular
from dwm_fast.errors import MaskFileError

JOURNAL = ".journal.json"
INDEX = "index.json"
_LOCK = ".lock"
_QUEUE = ".queue"
_MAX_BYTES = 32 << 20
"""A longer journal or index is refused."""
_TRIES = 10
_held = threading.local()

Result = TypeVar("Result")


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold the folder's lock: one writer, or any number of readers. It ends with the process that holds it.

    A writer in waiting holds up new readers, so many readers cannot keep it out for ever. A thread that holds the
    lock may take it again for reading. A reader makes no file: where there is no lock file, or none that it may
    open, or the file system has no locks, it goes on without one and gets False (`read_stable` deals with that).
    """
    held: set[Path] = _held.__dict__.setdefault("folders", set())
    place = folder.resolve()
    if shared and place in held:
        yield True
        return
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as queue:
            hold_lock(folder / _QUEUE, queue, shared=shared)
            sure = hold_lock(folder / _LOCK, stack, shared=shared)
        held.add(place)
        stack.callback(held.discard, place)
        yield sure


def read_stable(folder: Path, read: Callable[[], Result]) -> Result:
    """What `read()` finds in a folder at one moment: under its lock, or else with nothing changed around it."""
    for number in range(1, _TRIES + 1):
        with locked(folder, shared=True) as sure:
            if sure:
                return read()
            before = _state(folder)
            try:
                result = read()
            except MaskFileError:
                after = _state(folder)
                if number == _TRIES or (before == after and after[1] is None):
                    raise
            else:
                if number == _TRIES or before == _state(folder):
                    return result
        time.sleep(0.005 * number)
    raise AssertionError("the last try returns or raises")


def _state(folder: Path) -> list[tuple[int, int, int] | None]:
    """What every change of the folder alters: its index, journal and lock file."""
    marks: list[tuple[int, int, int] | None] = []
    for name in (INDEX, JOURNAL, _LOCK):
        try:
            info = os.lstat(folder / name)
            marks.append((info.st_ino, info.st_mtime_ns, info.st_size))
        except OSError:
            marks.append(None)
    return marks


def write_journal(folder: Path, replace: Mapping[str, Path], delete: Iterable[str]) -> None:
    """Record that every prepared part is to take its name's place and the rest to go: the instant of change.

    `recover` carries it out, at once or when the process that wrote it is gone. Needs the lock.
    """
    plan = {"replace": {name: part.name for name, part in replace.items()}, "delete": sorted(delete)}
    sync_folder(folder)
    os.replace(write_part(folder / JOURNAL, json.dumps(plan, sort_keys=True)), folder / JOURNAL)
    sync_folder(folder)


def recover(folder: Path) -> None:
    """Carry out a recorded change, and drop leftovers of those that never came so far. Needs the lock."""
    plan = read_journal(folder)
    if plan is not None:
        for name, part in plan[0].items():
            if _is_part(folder / part):
                os.replace(folder / part, folder / name)
        for name in plan[1]:
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        (folder / JOURNAL).unlink()
        sync_folder(folder)
    for leftover in folder.glob(f".*{PART}"):
        drop_part(leftover)


def _is_part(path: Path) -> bool:
    """Whether a part that a journal names is there, itself and no link to another file."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def current_path(folder: Path, name: str) -> Path:
    """Where the content of `name` is now, for a reader that may not write and meets an unfinished commit."""
    plan = read_journal(folder)
    part = plan[0].get(name) if plan is not None else None
    return folder / part if part is not None and _is_part(folder / part) else folder / name


def read_journal(folder: Path) -> tuple[dict[str, str], list[str]] | None:
    """The unfinished commit of `folder`: ({name: part}, [deleted names]); None when there is none."""
    path = folder / JOURNAL
    try:
        plan = json.loads(read_small(path, follow=False))
        replace, delete = plan["replace"], plan["delete"]
        names = [*replace, *replace.values(), *delete]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MaskFileError(f"{path}: not a journal ({reason(error)}); restore the folder from a copy") from error
    if not all(isinstance(name, str) and name not in ("", ".", "..") and not set("/\0") & set(name) for name in names):
        raise MaskFileError(f"{path}: names a file outside its folder; restore the folder from a copy")
    return replace, delete


def read_small(path: Path, follow: bool = True) -> bytes:
    """The bytes of an index or a journal, an ordinary file of bounded size."""
    with open_regular(path, follow) as file:
        if os.fstat(file.fileno()).st_size > _MAX_BYTES:
            raise MaskFileError(f"{path}: longer than {_MAX_BYTES} bytes")
        return file.read(_MAX_BYTES + 1)
