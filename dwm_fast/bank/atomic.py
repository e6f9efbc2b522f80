"""Files that are either old or new: one file by rename, several by a journal, under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dwm_fast._files import PART, sync_folder, write_atomic
from dwm_fast.errors import MaskFileError

JOURNAL = ".journal.json"
_held = threading.local()
_LOCK = ".lock"
_QUEUE = ".queue"


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the folder's lock: one writer, or any number of readers. It ends with the process that holds it.

    A writer in waiting holds up new readers, so many readers cannot keep it out for ever. A thread that holds the
    lock may take it again for reading. A reader in a folder where no lock can be made goes on without one.
    """
    held: set[Path] = _held.__dict__.setdefault("folders", set())
    place = folder.resolve()
    if shared and place in held:
        yield
        return
    with contextlib.ExitStack() as stack:
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        with contextlib.ExitStack() as queue:
            _lock(folder / _QUEUE, mode, queue, shared)
            _lock(folder / _LOCK, mode, stack, shared)
        held.add(place)
        stack.callback(held.discard, place)
        yield


def _lock(path: Path, mode: int, stack: contextlib.ExitStack, optional: bool) -> None:
    """Lock the file at `path` until the stack is left."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        if not optional:
            raise
        return
    stack.callback(os.close, handle)
    fcntl.flock(handle, mode)


def commit(folder: Path, replace: Mapping[str, Path], delete: Iterable[str]) -> None:
    """Rename every prepared part onto its name and delete the rest, all or nothing even under SIGKILL.

    The journal's rename is the instant of change; `recover` finishes what is cut off after it. Needs the
    lock.
    """
    plan = {"replace": {name: part.name for name, part in replace.items()}, "delete": sorted(delete)}
    sync_folder(folder)
    write_atomic(folder / JOURNAL, json.dumps(plan, sort_keys=True), MaskFileError)
    recover(folder)


def recover(folder: Path) -> None:
    """Finish a commit that was cut off, and drop leftovers of one that never began. Needs the lock."""
    plan = read_journal(folder)
    if plan is not None:
        for name, part in plan[0].items():
            if (folder / part).exists():
                os.replace(folder / part, folder / name)
        for name in plan[1]:
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        (folder / JOURNAL).unlink()
        sync_folder(folder)
    for leftover in folder.glob(f".*{PART}"):
        leftover.unlink(missing_ok=True)


def current_path(folder: Path, name: str) -> Path:
    """Where the content of `name` is now, for a reader that may not write and meets an unfinished commit."""
    plan = read_journal(folder)
    part = plan[0].get(name) if plan is not None else None
    return folder / part if part is not None and (folder / part).exists() else folder / name


def read_journal(folder: Path) -> tuple[dict[str, str], list[str]] | None:
    """The unfinished commit of `folder`: ({name: part}, [deleted names]); None when there is none."""
    path = folder / JOURNAL
    try:
        plan = json.loads(path.read_bytes())
        replace, delete = plan["replace"], plan["delete"]
        names = [*replace, *replace.values(), *delete]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MaskFileError(f"{path}: not a journal ({error}); restore the folder from a copy") from error
    if not all(isinstance(name, str) and name not in ("", ".", "..") and "/" not in name for name in names):
        raise MaskFileError(f"{path}: names a file outside its folder; restore the folder from a copy")
    return replace, delete
