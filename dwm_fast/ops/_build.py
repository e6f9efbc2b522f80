"""Builds, caches and loads the optional C++/CUDA extension; nothing here can stop the library from working.

A binary is compiled once per source text, torch ABI target and machine, into a folder of the user's cache. It sits on
LibTorch's stable ABI (target 2.11), so it serves every later torch and any Python. A checksum beside it tells a
damaged file before the loader touches it; a lock keeps two processes from building at once; a rename puts it in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dwm_fast.errors import BackendUnavailable

ABI_TARGET = 0x020B000000000000
"""TORCH_TARGET_VERSION: the oldest torch whose stable ABI the binary uses, 2.11."""

DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"

_LIBRARIES = {"cpu": "dwm_fast_cpu", "cuda": "dwm_fast_cuda"}
_BUILD = "run `dwm-fast build --verbose` to see why"
_loaded: dict[str, Path] = {}
_refused: dict[str, str] = {}


@dataclass(frozen=True)
class _Step:
    """One compiler call: `command` turns `source` into `target`."""

    target: str
    source: str
    command: tuple[str, ...]


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
    """What `doctor` shows: compiler, nvcc, folder, and per library its file, whether it is loaded, why it is not."""
    folder = _cache_folder(create=False)
    report: dict[str, object] = {
        "enabled": _enabled(),
        "compiler": find_compiler(),
        "ninja": find_ninja(),
        "nvcc": find_nvcc(),
        "folder": None if folder is None else str(folder),
    }
    for kind in _LIBRARIES:
        path = _existing(kind)
        report[kind] = {
            "built": path is not None and _is_sound(path),
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


def sources_folder() -> Path:
    """Where the C++ and CUDA sources lie: package data, also in an editable install."""
    spec = importlib.util.find_spec("dwm_fast._csrc")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable("the extension's sources are not installed; reinstall dwm-fast")
    return Path(next(iter(spec.submodule_search_locations)))


def _sources(kind: str) -> list[Path]:
    folder = sources_folder()
    suffixes = (".h", ".cpp") if kind == "cpu" else (".h", ".cu")
    return sorted(p for p in folder.iterdir() if p.suffix in suffixes)


def _key(kind: str) -> str:
    """Twelve hex digits that change with anything that changes the binary, apart from the compiler's version."""
    digest = hashlib.sha256()
    settings = [hex(ABI_TARGET), sys.platform, platform.machine(), *_compile_flags(_is_msvc(find_compiler() or ""))]
    settings += [cuda_archs()] if kind == "cuda" else [" ".join(flags) for _, _, flags in _instruction_sets()]
    digest.update("\n".join(settings).encode())
    for source in _sources(kind):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]


def _file_name(kind: str) -> str:
    suffix = ".dll" if sys.platform == "win32" else ".so"
    return f"{_LIBRARIES[kind]}-{_key(kind)}{suffix}"


def _cache_folder(create: bool = True) -> Path | None:
    """The folder of built binaries: DWM_FAST_EXT_DIR, the user's cache, or a private one below the temp folder."""
    chosen = os.environ.get("DWM_FAST_EXT_DIR")
    if chosen:
        candidates = [Path(chosen)]
    else:
        home = os.environ.get("XDG_CACHE_HOME")
        with contextlib.suppress(RuntimeError):
            home = home or str(Path.home() / ".cache")
        candidates = [Path(home) / "dwm_fast"] if home else []
    for folder in candidates:
        if _is_writable(folder, create):
            return folder
    if chosen:
        return None
    private = Path(tempfile.gettempdir()) / f"dwm_fast-{_user_id()}"
    return private if _is_private(private, create) else None


def _user_id() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _is_writable(folder: Path, create: bool) -> bool:
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return True
        return folder.is_dir() and os.access(folder, os.W_OK)
    except OSError:
        return False


def _is_private(folder: Path, create: bool) -> bool:
    """Whether `folder` below a shared temp folder is a real folder that only this user may write to."""
    try:
        if create:
            folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
    except OSError:
        return False
    if sys.platform == "win32":
        return stat.S_ISDIR(info.st_mode)
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022


def _existing(kind: str) -> Path | None:
    """A built binary: shipped beside the sources by a packager, or in the cache."""
    try:
        name = _file_name(kind)
        folders = [sources_folder() / "prebuilt", _cache_folder(create=False)]
    except (BackendUnavailable, OSError):
        return None
    paths = [folder / name for folder in folders if folder is not None]
    return next((p for p in paths if p.is_file()), None)


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_sound(path: Path) -> bool:
    """Whether the binary is the one that was built; a truncated library could crash the process that maps it."""
    try:
        expected = _checksum_file(path).read_text().strip()
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except (OSError, UnicodeDecodeError):
        return False


def _ensure(kind: str, *, force: bool = False, verbose: bool = False) -> Path:
    """Path of a sound binary of `kind`, built now if there is none or `force`."""
    path = _existing(kind)
    if path is not None and not force and _is_sound(path):
        return path
    tool = _require_tool(kind)
    folder = _cache_folder()
    if folder is None:
        raise BackendUnavailable("no folder to keep the extension in; set DWM_FAST_EXT_DIR to a writable one")
    path = folder / _file_name(kind)
    log = path.with_suffix(".log")
    started = time.time()
    with _lock(path.with_suffix(".lock")):
        if _is_sound(path) and (not force or path.stat().st_mtime > started):
            return path  # another process was faster
        if not force and _failed_before(log, tool):
            raise BackendUnavailable(f"{Path(tool).name} could not build the extension; {_BUILD}")
        _build_into(kind, tool, path, log, verbose)
    return path


def _require_tool(kind: str) -> str:
    compiler = find_compiler()
    if compiler is None:
        raise BackendUnavailable(
            "no C++ compiler is on PATH; install one (Debian, Ubuntu: apt install g++) and run `dwm-fast build`"
        )
    if kind == "cpu":
        return compiler
    nvcc = find_nvcc()
    if nvcc is None:
        raise BackendUnavailable("nvcc is not on PATH and CUDA_HOME is not set; install the CUDA toolkit or use triton")
    return nvcc


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` against other processes; where the file system has no locks the rename alone keeps things whole."""
    with open(path, "a+b") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


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
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as scratch:
        folder = Path(scratch)
        steps = _cpu_steps(tool, path.name) if kind == "cpu" else _cuda_steps(tool, path.name)
        message = _run_steps(steps, folder, verbose)
        if message is not None:
            log.write_text(f"{_tool_stamp(tool)}\n{message}\n")
            raise BackendUnavailable(f"{Path(tool).name} could not build the extension (log: {log}); {_BUILD}")
        built = folder / path.name
        checksum = folder / _checksum_file(path).name
        checksum.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        os.replace(checksum, _checksum_file(path))
        os.replace(built, path)
    log.unlink(missing_ok=True)
    print(f"dwm_fast: built in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def _run_steps(steps: list[_Step], folder: Path, verbose: bool) -> str | None:
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


def _ninja_file(steps: list[_Step]) -> str:
    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = []
    objects = [step.target for step in steps[:-1]]
    for number, step in enumerate(steps):
        command = subprocess.list2cmdline(step.command) if sys.platform == "win32" else _shell(step.command)
        inputs = [step.source] if step is not steps[-1] else objects
        lines += [f"rule step{number}", f"  command = {command.replace('$', '$$')}", f"  description = {step.target}"]
        lines.append(f"build {escape(step.target)}: step{number} {' '.join(map(escape, inputs))}")
    return "\n".join(lines) + "\n"


def _shell(command: tuple[str, ...]) -> str:
    import shlex

    return shlex.join(command)


def find_ninja() -> str | None:
    """ninja on PATH or from its Python package; without it the compiler is called directly."""
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        candidate = Path(sys.prefix) / ("Scripts" if sys.platform == "win32" else "bin") / "ninja"
        found = str(candidate) if candidate.exists() else None
    return found


def find_compiler() -> str | None:
    """The C++ compiler: CXX, else the first of c++, g++, clang++ (Windows: cl) on PATH."""
    names = ("cl",) if sys.platform == "win32" else ("c++", "g++", "clang++")
    for name in (os.environ.get("CXX"), *names):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def _is_msvc(compiler: str) -> bool:
    return Path(compiler).stem.lower() == "cl"


def _torch_folders() -> tuple[Path, Path]:
    root = Path(torch.__file__).parent
    return root / "include", root / "lib"


def _defines() -> list[str]:
    return [f"TORCH_TARGET_VERSION={ABI_TARGET:#018x}"]


def _compile_flags(msvc: bool) -> list[str]:
    """Flags of every C++ file. Contraction stays off: the same bits on processors with and without fused products."""
    if msvc:
        return ["/nologo", "/std:c++20", "/O2", "/EHsc", "/MD", "/fp:precise", "/openmp:experimental"]
    return ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
            "-fno-trapping-math", "-fopenmp-simd"]  # fmt: skip


def _instruction_sets() -> list[tuple[str, str, list[str]]]:
    """(namespace, table, flags) of every copy of the kernels: the portable one, and AVX2 on x86-64."""
    sets = [("baseline", "kKernelsBaseline", list[str]())]
    if platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32":
        sets.append(("avx2", "kKernelsAvx2", ["-march=x86-64-v3"]))
    return sets


def _cpu_steps(compiler: str, target: str) -> list[_Step]:
    msvc = _is_msvc(compiler)
    folder = sources_folder()
    include, libraries = _torch_folders()
    define, suffix = ("/D", ".obj") if msvc else ("-D", ".o")
    system = ["/I", str(include)] if msvc else ["-isystem", str(include)]
    sets = _instruction_sets()

    def compile_step(name: str, source: Path, flags: list[str]) -> _Step:
        output = [f"/Fo{name}{suffix}"] if msvc else ["-o", name + suffix]
        command = [compiler, *_compile_flags(msvc), *flags, "/c" if msvc else "-c", str(source), *output]
        return _Step(name + suffix, str(source), tuple(command))

    extra = ["DWM_WITH_AVX2"] if len(sets) > 1 else []
    steps = [
        compile_step(
            f"kernels_{name}", folder / "kernels.cpp", [*flags, f"{define}DWM_ISA={name}", f"{define}DWM_TABLE={table}"]
        )
        for name, table, flags in sets
    ]
    binding = [*system, *(f"{define}{d}" for d in (*_defines(), *extra)), *([] if msvc else ["-O2"])]
    steps.append(compile_step("bind_cpu", folder / "bind_cpu.cpp", binding))
    objects = [step.target for step in steps]
    if msvc:
        link = [compiler, "/nologo", "/LD", *objects, f"/Fe{target}", "/link", f"/LIBPATH:{libraries}", "torch_cpu.lib"]
    else:
        link = [compiler, "-shared", "-o", target, *objects, f"-L{libraries}", "-ltorch_cpu"]
    return [*steps, _Step(target, "", tuple(link))]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME where a user set it, else the toolkit behind the nvcc on PATH (which may be a wrapper)."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
        if found:
            return found
    on_path = shutil.which("nvcc")
    return None if on_path is None else _behind_wrapper(on_path)


def _behind_wrapper(nvcc: str) -> str:
    """The real nvcc: a dry run names its toolkit folder as TOP."""
    try:
        done = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return nvcc
    for line in (done.stdout + done.stderr).splitlines():
        name, _, value = line.removeprefix("#$ ").partition("=")
        if name == "TOP":
            return shutil.which("nvcc", path=str(Path(value) / "bin")) or nvcc
    return nvcc


def cuda_archs() -> str:
    """Architectures to compile for: DWM_FAST_CUDA_ARCHS, TORCH_CUDA_ARCH_LIST, or 8.0 and 9.0 with PTX."""
    return os.environ.get("DWM_FAST_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS


def _gencode(archs: str) -> list[str]:
    flags = []
    for arch in archs.replace(",", ";").replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number:
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _cuda_steps(nvcc: str, target: str) -> list[_Step]:
    source = sources_folder() / "bits_cuda.cu"
    include, libraries = _torch_folders()
    object_file = "bits_cuda.obj" if sys.platform == "win32" else "bits_cuda.o"
    host = [] if sys.platform == "win32" else ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    compile_command = [
        nvcc, "-std=c++20", "-O3", *host, "-DUSE_CUDA", *(f"-D{d}" for d in _defines()), "-isystem", str(include),
        *_gencode(cuda_archs()), "-c", str(source), "-o", object_file,
    ]  # fmt: skip
    link = [nvcc, "-shared", "-o", target, object_file, f"-L{libraries}", "-ltorch_cpu", "-ltorch_cuda"]
    return [_Step(object_file, str(source), tuple(compile_command)), _Step(target, "", tuple(link))]
