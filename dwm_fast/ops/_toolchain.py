"""Which tools build the extension, and the exact commands: compiler, ninja, nvcc, flags.

Linux is built and tested; the flags for macOS (clang) and Windows (cl) are kept beside them and are untested.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from dwm_fast.errors import BackendUnavailable

ABI_TARGET = 0x020B000000000000
"""TORCH_TARGET_VERSION: the oldest torch whose stable ABI the binary uses, 2.11."""

DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"


@dataclass(frozen=True)
class Step:
    """One compiler call: `command` turns `source` into `target`."""

    target: str
    source: str
    command: tuple[str, ...]


def sources_folder() -> Path:
    """Where the C++ and CUDA sources lie: package data, also in an editable install."""
    spec = importlib.util.find_spec("dwm_fast._csrc")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable("the extension's sources are not installed; reinstall dwm-fast")
    return Path(next(iter(spec.submodule_search_locations)))


def find_ninja() -> str | None:
    """ninja on PATH or from its Python package; without it the compiler is called directly."""
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        candidate = Path(sys.prefix) / ("Scripts" if sys.platform == "win32" else "bin") / "ninja"
        return str(candidate) if candidate.exists() else None
    return found


def find_compiler() -> str | None:
    """The C++ compiler: CXX, else the first of c++, g++, clang++ (Windows: cl) on PATH."""
    names = ("cl",) if sys.platform == "win32" else ("c++", "g++", "clang++")
    for name in (os.environ.get("CXX"), *names):
        found: str | None = shutil.which(name) if name else None
        if found:
            return found
    return None


def is_msvc(compiler: str) -> bool:
    return Path(compiler).stem.lower() == "cl"


def _torch_folders() -> tuple[Path, Path]:
    root = Path(torch.__file__).parent
    return root / "include", root / "lib"


def _defines() -> list[str]:
    return [f"TORCH_TARGET_VERSION={ABI_TARGET:#018x}"]


def compile_flags(msvc: bool) -> list[str]:
    """Flags of every C++ file. Contraction stays off: the same bits on processors with and without fused products."""
    if msvc:
        return ["/nologo", "/std:c++20", "/O2", "/EHsc", "/MD", "/fp:precise", "/openmp:experimental"]
    return ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
            "-fno-trapping-math", "-fopenmp-simd"]  # fmt: skip


def instruction_sets() -> list[tuple[str, str, list[str]]]:
    """(namespace, table, flags) of every copy of the kernels: the portable one, AVX2 and two of AVX-512 on x86-64."""
    sets = [("baseline", "kKernelsBaseline", list[str]())]
    if platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32":
        narrow = ["-mavx2", "-mfma", "-mpopcnt"]
        parts = ("f", "bw", "dq", "vl", "vbmi2", "vpopcntdq")
        wide = [*narrow, *(f"-mavx512{part}" for part in parts)]
        sets.append(("avx2", "kKernelsAvx2", narrow))
        sets.append(("avx512", "kKernelsAvx512", wide))
        sets.append(("avx512bf16", "kKernelsAvx512Bf16", [*wide, "-mavx512bf16"]))
    return sets


def cpu_steps(compiler: str, target: str) -> list[Step]:
    msvc = is_msvc(compiler)
    folder = sources_folder()
    include, libraries = _torch_folders()
    define, suffix = ("/D", ".obj") if msvc else ("-D", ".o")
    system = ["/I", str(include)] if msvc else ["-isystem", str(include)]
    sets = instruction_sets()

    def compile_step(name: str, source: Path, flags: list[str]) -> Step:
        output = [f"/Fo{name}{suffix}"] if msvc else ["-o", name + suffix]
        command = [compiler, *compile_flags(msvc), *flags, "/c" if msvc else "-c", str(source), *output]
        return Step(name + suffix, str(source), tuple(command))

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
    return [*steps, Step(target, "", tuple(link))]


def find_c_compiler() -> str | None:
    """The C compiler that Triton calls: CC as it stands, else gcc or clang on PATH."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def python_header() -> Path:
    """Python.h where Triton looks for it; Debian's own scheme names a folder that Debian does not fill."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)) / "Python.h"


def _c_obstacle() -> str:
    """What this machine lacks to compile a C module for this Python, and what to type; "" where nothing is missing."""
    if find_c_compiler() is None:
        return "there is no C compiler; install one (Debian, Ubuntu: apt install gcc) or set CC"
    header = python_header()
    if not header.is_file():
        return f"{header} is missing; install Python's headers (Debian, Ubuntu: apt install python3-dev)"
    return ""


def require_triton_launcher() -> None:
    """BackendUnavailable, with one line that says why, unless Triton can launch kernels on this machine's GPU.

    Triton's driver is C source that it compiles at the first launch and keeps in its cache; in older releases (3.6) so
    is a launcher for every signature, which no cache can be trusted to hold. What is missing is found here, before a
    compiler prints.
    """
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    reason = "" if knobs.build.impl else _c_obstacle()

    def refuse(*_: object) -> str:
        raise BackendUnavailable(f"Triton compiles its launcher and {reason}")

    if reason and hasattr(nvidia, "make_launcher"):
        refuse()
    try:
        with knobs.build.scope():
            if reason:
                knobs.build.impl = refuse
            _ = driver.active.utils
    except BackendUnavailable:
        raise
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackendUnavailable(f"Triton cannot start its CUDA driver: {line}") from error


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
            real: str | None = shutil.which("nvcc", path=str(Path(value).resolve() / "bin"))
            return real or nvcc
    return nvcc


def cuda_archs() -> str:
    """Architectures to compile for: DWM_FAST_CUDA_ARCHS, TORCH_CUDA_ARCH_LIST, or 8.0 and 9.0 with PTX."""
    return os.environ.get("DWM_FAST_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS


def gencode(archs: str) -> list[str]:
    """nvcc flags of a list such as "8.0;9.0+PTX"."""
    flags = []
    for arch in archs.replace(",", ";").replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number:
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_steps(nvcc: str, target: str) -> list[Step]:
    folder = sources_folder()
    include, libraries = _torch_folders()
    ending = "obj" if sys.platform == "win32" else "o"
    host = [] if sys.platform == "win32" else ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    steps = []
    for name in ("bits_cuda", "kept_cuda"):
        source, object_file = str(folder / f"{name}.cu"), f"{name}.{ending}"
        command = [
            nvcc, "-std=c++20", "-O3", *host, "-DUSE_CUDA", *(f"-D{d}" for d in _defines()), "-isystem", str(include),
            *gencode(cuda_archs()), "-c", source, "-o", object_file,
        ]  # fmt: skip
        steps.append(Step(object_file, source, tuple(command)))
    objects = [step.target for step in steps]
    link = [nvcc, "-shared", "-o", target, *objects, f"-L{libraries}", "-ltorch_cpu", "-ltorch_cuda"]
    return [*steps, Step(target, "", tuple(link))]
