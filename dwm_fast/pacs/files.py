"""Writing a result file: whole or not at all, and one clear line when it cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dwm_fast.errors import DataError


def write_atomic(path: Path | str, content: bytes | str) -> Path:
    """Write `content` (text as UTF-8) to `path`: a temporary file beside it, fsync, rename; folders are made.

    A reader, or a run killed half-way, sees the old file or the new one, never a part.

    Raises:
        DataError: the folder cannot be made or written, or the disk is full; no temporary file is left.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        reason = error.strerror or str(error)
        hint = "choose a folder that is writable and has space"
        raise DataError(f"cannot write {path}: {reason}; {hint}") from error
    return path
