"""Writing files so that a reader sees the old content or the new one, never a part; and where a user's cache lies."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dwm_fast.errors import DataError, DwmError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PART = ".part"
"""How the name of a file ends that is still being written."""

_DAY = 86_400.0

Chunk = bytes | memoryview


def write_atomic(
    path: str | os.PathLike[str], content: Chunk | str | Iterable[Chunk], error: type[DwmError] = DataError
) -> None:
    """Write `content` (text as UTF-8, bytes, or chunks of bytes) to `path`: part file beside it, fsync, rename, fsync.

    Missing folders are made; the file gets the permissions that an ordinary new file gets.

    Raises `error` with one line when the folder cannot be written or the disk is full; the old file stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part(path, content) as part:
            os.replace(part, path)
        sync_folder(path.parent)
    except (OSError, ValueError) as cause:
        advice = "free the disk or choose another folder" if isinstance(cause, OSError) else "choose another name"
        raise error(f"cannot write {path}: {reason(cause)}; {advice}") from cause


def write_part(path: Path, content: Chunk | str | Iterable[Chunk]) -> Path:
    """Write `content` to a new hidden file beside `path`, forced to disk; the caller renames it.

    Until then `drop_part` takes it for an orphan: the caller holds the lock under which parts are dropped.
    """
    with _part(path, content) as part:
        return part


@contextlib.contextmanager
def _part(path: Path, content: Chunk | str | Iterable[Chunk]) -> Iterator[Path]:
    """A new hidden file beside `path`, forced to disk: locked (a sign of life) in the block, gone when that fails."""
    content = content.encode() if isinstance(content, str) else content
    file, part = _new_part(path)
    try:
        with file:
            for chunk in [content] if isinstance(content, bytes | memoryview) else content:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _new_part(path: Path) -> tuple[BinaryIO, Path]:
    while True:
        part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}{PART}")
        file = part.open("xb")
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file, part
        file.close()  # dropped as an orphan before it was locked


def drop_part(part: Path) -> None:
    """Delete a part file whose writer has ended; one that is being written stays. Where no locks are: after a day."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(part.lstat().st_mode):
            part.unlink()
            return
        with part.open("rb") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                old = time.time() - os.fstat(file.fileno()).st_mtime > _DAY
                if isinstance(error, BlockingIOError) or not old:
                    return
            part.unlink()


def hold_lock(path: Path, stack: contextlib.ExitStack, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock the file at `path`, an ordinary one, until `stack` is left, or the process ends in whatever way.

    A shared lock makes no file and returns False where it cannot be had. Otherwise OSError: BlockingIOError where
    another holds the lock and `wait` is off.
    """
    assert fcntl is not None
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT)
    try:
        handle = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(f"{path.name} is no ordinary file")
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            os.close(handle)
            raise
    except OSError:
        if not shared:
            raise
        return False
    stack.callback(_release, handle)
    return True


def _release(handle: int) -> None:
    """Give the lock up before closing: a process forked meanwhile has the handle too and would keep it."""
    assert fcntl is not None
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system can do that for folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path | None:
    """The library's folder in the user's cache; None where there is no home.

    A relative XDG_CACHE_HOME is ignored, as the XDG specification demands: it would name a folder of whatever
    directory the program happens to run in.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "dwm_fast"


def reason(error: BaseException) -> str:
    """What went wrong, in one line, without the file's name."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
