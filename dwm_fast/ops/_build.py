"""Builds, caches and loads the optional C++/CUDA extension; nothing here can stop the library from working.

A binary is compiled once per source text, torch ABI target and machine, into a folder of the user's cache. It sits on
LibTorch's stable ABI (target 2.11), so it serves every later torch and any Python. A checksum beside it tells a
damaged file before the loader touches it; a lock keeps two processes from building at once; a rename puts it in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dwm_fast._files import cache_folder, write_atomic
from dwm_fast.errors import BackendUnavailable
from dwm_fast.ops._toolchain import (
    ABI_TARGET,
    Step,
    compile_flags,
    cpu_steps,
    cuda_archs,
    cuda_steps,
    find_compiler,
    find_ninja,
    find_nvcc,
    instruction_sets,
    is_msvc,
    sources_folder,
)

_LIBRARIES = {"cpu": "dwm_fast_cpu", "cuda": "dwm_fast_cuda"}
_BUILD = "run `dwm-fast build --verbose` to see why"
_DAY = 86_400.0
_loaded: dict[str, Path] = {}
_refused: dict[str, str] = {}


def build(force: bool = False, cuda: bool | None = None, verbose: bool = False) -> Path:
    """Build what is not in the cache yet and return the path of the CPU library.

    Args:
        force: build again even if a good binary is in the cache.
        cuda: whether to build the CUDA library too; None builds it where nvcc is found.
        verbose: show the compiler's commands and messages.

    Raises:
        BackendUnavailable: no compiler, no nvcc (with cuda=True), no folder to write to, or a compiler error.
    """
    path = _ensure("cpu", force=force, verbose=verbose)
    if cuda or (cuda is None and find_nvcc() is not None):
        _ensure("cuda", force=force, verbose=verbose)
    return path


def load(kind: str) -> None:
    """Load the library `kind` ("cpu" or "cuda") into this process, building it first if need be.

    Raises BackendUnavailable with one line; a refusal is remembered and costs nothing the next time.
    """
    if kind in _loaded:
        return
    if kind not in _refused:
        try:
            _load_once(kind)
            return
        except BackendUnavailable as error:
            _refused[kind] = str(error)
    raise BackendUnavailable(_refused[kind])


def status() -> dict[str, object]:
    """What `doctor` shows: compiler, ninja, nvcc, folders, and per library its file, whether it is loaded, why not."""
    report: dict[str, object] = {
        "enabled": _enabled(),
        "compiler": find_compiler(),
        "ninja": find_ninja(),
        "nvcc": find_nvcc(),
        "folders": [str(folder) for folder in _folders()],
    }
    for kind in _LIBRARIES:
        path = _existing(kind)
        report[kind] = {
            "path": None if path is None else str(path),
            "loaded": kind in _loaded,
            "reason": _refused.get(kind),
        }
    return report


def _enabled() -> bool:
    return os.environ.get("DWM_FAST_EXT", "1").lower() not in ("0", "off", "false", "no")


def _load_once(kind: str) -> None:
    if not _enabled():
        raise BackendUnavailable("the extension is turned off by DWM_FAST_EXT; unset it to use the extension")
    path = _ensure(kind)
    try:
        _load_library(path)
    except OSError:
        # Built for another machine, or damaged in a way that a checksum cannot tell: replace it once.
        path = _ensure(kind, force=True)
        try:
            _load_library(path)
        except OSError as error:
            raise BackendUnavailable(f"{path.name} does not load ({_first_line(error)}); {_BUILD}") from error
    _loaded[kind] = path


def _load_library(path: Path) -> None:
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


def _first_line(error: object) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _sources(kind: str) -> list[Path]:
    folder = sources_folder()
    suffixes = (".h", ".cpp") if kind == "cpu" else (".h", ".cu")
    return sorted(p for p in folder.iterdir() if p.suffix in suffixes)


def _key(kind: str) -> str:
    """Twelve hex digits that change with anything that changes the binary, apart from the compiler's version."""
    digest = hashlib.sha256()
    settings = [hex(ABI_TARGET), sys.platform, platform.machine(), *compile_flags(is_msvc(find_compiler() or ""))]
    settings += [cuda_archs()] if kind == "cuda" else [" ".join(flags) for _, _, flags in instruction_sets()]
    digest.update("\n".join(settings).encode())
    for source in _sources(kind):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]


def _file_name(kind: str) -> str:
    suffix = ".dll" if sys.platform == "win32" else ".so"
    return f"{_LIBRARIES[kind]}-{_key(kind)}{suffix}"


def _folders(create: bool = False) -> list[Path]:
    """Where binaries may lie, in order: DWM_FAST_EXT_DIR alone, or the user's cache and a private temp folder.

    A folder counts when it is there and this user or root alone may write to it: who can put a library there can run
    code in this process. `create` makes them.
    """
    return [folder for folder in _candidates() if _is_private(folder, create)]


def _candidates() -> list[Path]:
    chosen = os.environ.get("DWM_FAST_EXT_DIR")
    if chosen:
        return [Path(chosen)]
    own = cache_folder()
    return [*([own] if own else []), Path(tempfile.gettempdir()) / f"dwm_fast-{_user_id()}"]


def _writable_folder() -> Path:
    """The first folder that a binary can be written to, made if need be."""
    for folder in _folders(create=True):
        try:
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    shared = [str(folder) for folder in _candidates() if folder.is_dir() and not _is_private(folder, create=False)]
    if shared:
        raise BackendUnavailable(
            f"others may write to {shared[0]}, so no library there is trusted; type: chmod 700 {shared[0]} (as its "
            "owner), or set DWM_FAST_EXT_DIR to a writable folder of your own"
        )
    raise BackendUnavailable("no folder to keep the extension in; set DWM_FAST_EXT_DIR to a writable one")


def _user_id() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _is_private(folder: Path, create: bool) -> bool:
    """Whether `folder` is a real folder, no link, that only this user or root may write to."""
    try:
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and _is_own(info) and (sys.platform == "win32" or not info.st_mode & 0o022)


def _is_own(info: os.stat_result) -> bool:
    return sys.platform == "win32" or info.st_uid in (0, os.getuid())


def _existing(kind: str) -> Path | None:
    """A sound binary that was built before."""
    name = _file_name(kind)
    return next((folder / name for folder in _folders() if _is_sound(folder / name)), None)


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_sound(path: Path) -> bool:
    """Whether the binary is the one that was built; a truncated library could crash the process that maps it."""
    try:
        for file in (path, _checksum_file(path)):
            info = file.lstat()
            if not stat.S_ISREG(info.st_mode) or not _is_own(info):
                return False
        expected = _checksum_file(path).read_text().strip()
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except (OSError, UnicodeDecodeError):
        return False


def _ensure(kind: str, *, force: bool = False, verbose: bool = False) -> Path:
    """Path of a sound binary of `kind`, built now if there is none or `force`."""
    path = _existing(kind)
    if path is not None and not force:
        return path
    tool = _require_tool(kind)
    path = _writable_folder() / _file_name(kind)
    log = path.with_suffix(".log")
    started = time.time()
    try:
        with _lock(path.with_suffix(".lock")) as alone:
            if _is_sound(path) and (not force or path.stat().st_mtime > started):
                return path  # another process was faster
            if not (force or verbose) and _failed_before(log, tool):
                raise BackendUnavailable(f"{Path(tool).name} could not build the extension (log: {log}); {_BUILD}")
            if alone:
                _sweep(path)
            _build_into(kind, tool, path, log, verbose)
    except OSError as error:
        raise BackendUnavailable(
            f"the extension cannot be kept in {path.parent} ({error.strerror}); set "
            f"DWM_FAST_EXT_DIR to a writable folder"
        ) from error
    return path


def _require_tool(kind: str) -> str:
    compiler = find_compiler()
    if compiler is None:
        raise BackendUnavailable(
            "no C++ compiler is on PATH; install one (Debian, Ubuntu: apt install g++) or set DWM_FAST_EXT=0"
        )
    if kind == "cpu":
        return compiler
    nvcc = find_nvcc()
    if nvcc is None:
        raise BackendUnavailable("nvcc is not on PATH and CUDA_HOME is not set; install the CUDA toolkit or use triton")
    return nvcc


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold `path` against other processes; False where there are no locks: there the rename alone keeps all whole."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600), "r+b") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _sweep(path: Path) -> None:
    """Delete what killed builds of this binary left, under its lock, and what older releases left a day ago."""
    for folder in path.parent.glob("build-*"):
        with contextlib.suppress(OSError):
            info = folder.lstat()
            orphan = folder.name.startswith(f"build-{path.stem}-") or time.time() - info.st_mtime > _DAY
            if stat.S_ISDIR(info.st_mode) and orphan:
                shutil.rmtree(folder)


def _tool_stamp(tool: str) -> str:
    found = shutil.which(tool) or tool
    try:
        return f"{found} {os.stat(found).st_mtime_ns}"
    except OSError:
        return found


def _failed_before(log: Path, tool: str) -> bool:
    """Whether this very compiler failed on these very sources: a start-up must not pay for that again."""
    try:
        return log.read_text(errors="replace").splitlines()[0] == _tool_stamp(tool)
    except (OSError, IndexError):
        return False


def _build_into(kind: str, tool: str, path: Path, log: Path, verbose: bool) -> None:
    name = "C++" if kind == "cpu" else "CUDA"
    print(f"dwm_fast: building the {name} extension once, about 15 s, into {path.parent}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"build-{path.stem}-", dir=path.parent) as scratch:
        folder = Path(scratch)
        steps = cpu_steps(tool, path.name) if kind == "cpu" else cuda_steps(tool, path.name)
        message = _run_steps(steps, folder, verbose)
        if message is not None:
            write_atomic(log, f"{_tool_stamp(tool)}\n{message}\n", BackendUnavailable)
            raise BackendUnavailable(f"{Path(tool).name} could not build the extension (log: {log}); {_BUILD}")
        built = folder / path.name
        checksum = folder / _checksum_file(path).name
        checksum.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        os.replace(checksum, _checksum_file(path))
        os.replace(built, path)
    log.unlink(missing_ok=True)
    print(f"dwm_fast: built in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def _run_steps(steps: list[Step], folder: Path, verbose: bool) -> str | None:
    """Compile every source, then link (the last step); returns the failing tool's message, or None."""
    ninja = find_ninja()
    if ninja is not None:
        (folder / "build.ninja").write_text(_ninja_file(steps))
        return _call([ninja, *(["-v"] if verbose else ["--quiet"])], folder, verbose)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for message in pool.map(lambda step: _call(list(step.command), folder, verbose), steps[:-1]):
            if message is not None:
                return message
    return _call(list(steps[-1].command), folder, verbose)


def _call(command: list[str], folder: Path, verbose: bool) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=folder, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        return f"{command[0]}: {error}"
    if verbose and done.stdout:
        print(done.stdout, file=sys.stderr, flush=True)
    return None if done.returncode == 0 else done.stdout or f"{command[0]} ended with {done.returncode}"


def _ninja_file(steps: list[Step]) -> str:
    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = []
    objects = [step.target for step in steps[:-1]]
    for number, step in enumerate(steps):
        command = subprocess.list2cmdline(step.command) if sys.platform == "win32" else shlex.join(step.command)
        inputs = [step.source] if step is not steps[-1] else objects
        lines += [f"rule step{number}", f"  command = {command.replace('$', '$$')}", f"  description = {step.target}"]
        lines.append(f"build {escape(step.target)}: step{number} {' '.join(map(escape, inputs))}")
    return "\n".join(lines) + "\n"
