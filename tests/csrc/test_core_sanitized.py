"""The C++ core without torch stays inside its buffers and free of undefined behaviour."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dwm_fast.ops import _toolchain

HERE = Path(__file__).parent
SANITIZE = (
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-maybe-uninitialized",
)  # what GCC 12 says of its own header of AVX-512


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_core_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    compiler = _toolchain.find_compiler()
    assert compiler is not None, "the tests need a C++ compiler: apt install g++"
    sources = _toolchain.sources_folder()
    flags = [f for f in _toolchain.compile_flags(msvc=False) if f != "-O3"]
    sets = _toolchain.instruction_sets()
    common = [compiler, *flags, *SANITIZE, "-I", sources, *(["-DDWM_WITH_AVX2"] if len(sets) > 1 else [])]
    jobs: list[list[str | Path]] = [[*common, "-c", HERE / "test_core.cpp", "-o", tmp_path / "test_core.o"]]
    for name, table, extra in sets:
        define = [f"-DDWM_ISA={name}", f"-DDWM_TABLE={table}"]
        jobs.append([*common, *extra, *define, "-c", sources / "kernels.cpp", "-o", tmp_path / f"{name}.o"])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: run(*job), jobs))
    program = tmp_path / "test_core"
    run(compiler, "-fsanitize=address,undefined", *(job[-1] for job in jobs), "-o", program)
    assert run(program) == "ok\n"


def test_a_warp_of_the_gpu_finds_every_kept_weight(tmp_path: Path) -> None:
    compiler = _toolchain.find_compiler()
    assert compiler is not None, "the tests need a C++ compiler: apt install g++"
    program = tmp_path / "test_kept_tile"
    source = HERE / "test_kept_tile.cpp"
    run(compiler, "-std=c++20", *SANITIZE, "-I", _toolchain.sources_folder(), source, "-o", program)
    assert run(program) == "ok\n"
