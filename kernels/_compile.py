"""Compile every kernel configuration for a GPU that need not be there, and refuse what is not as it was meant.

    python -m dwm_fast.kernels._compile --target 90

prints one line per configuration and exits with 1 when one spills, takes more shared memory than a block may have,
reads or writes in narrower pieces than meant, waits at barriers where none is meant, or lacks wgmma, has it serialised
or loads its operands without asynchronous copies where they are meant. It must not run under TRITON_INTERPRET=1,
which leaves nothing to compile.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dwm_fast.kernels._compile_products import product_configurations
from dwm_fast.kernels._compile_sass import MAX_SHARED, Usage, faults, read_usage
from dwm_fast.kernels._compile_walks import walk_configurations
from dwm_fast.kernels._configuration import Configuration
from dwm_fast.kernels._launch import OPTIONS
from dwm_fast.kernels._math import INTERPRETED


@dataclasses.dataclass(frozen=True)
class Excuse:
    """A fault that is known and why it stays; `versions` of Triton and `targets` that have it. Unneeded, it fails."""

    fault: str
    targets: tuple[int, ...]
    versions: tuple[str, ...]
    reason: str


EXCUSES: dict[str, tuple[Excuse, ...]] = {}
"""By name of a configuration."""


@functools.cache
def configurations() -> tuple[Configuration, ...]:
    """The configurations that the launchers use, without those that leave out paths or change dtypes of one here."""
    return (*walk_configurations(), *product_configurations())


def compile_configuration(configuration: Configuration, target: int) -> Usage:
    """Compile for compute capability `target` (90 = sm_90) and read what came out from the binary."""
    kernel = configuration.kernel
    names = [name for name in kernel.arg_names if name not in configuration.constants]
    signature = dict(zip(names, configuration.types, strict=True))
    signature |= dict.fromkeys(configuration.constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, name in enumerate(kernel.arg_names)
        if str(signature[name]).startswith("*") or name in configuration.aligned
    }
    source = ASTSource(kernel, signature, constexprs=configuration.constants, attrs=attributes)
    options = {"num_warps": configuration.num_warps, **OPTIONS}
    log = io.StringIO()
    # A kernel from the cache has no log of ptxas, which alone says that wgmma is serialised.
    with contextlib.redirect_stdout(log), triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return read_usage(compiled.asm["cubin"], log.getvalue(), compiled.metadata.shared)


def excused(name: str, found: dict[str, str], target: int, version: str) -> dict[str, str]:
    """The faults that remain: without those that an excuse names, and with every excuse that nothing needs."""
    remaining = dict(found)
    for excuse in EXCUSES.get(name, ()):
        if target in excuse.targets and any(version.startswith(known) for known in excuse.versions):
            if excuse.fault in remaining:
                del remaining[excuse.fault]
            else:
                remaining["unneeded excuse"] = f"{excuse.fault} is no longer there; drop its excuse"
    return remaining


def describe(configuration: Configuration, usage: Usage, target: int, remaining: dict[str, str]) -> str:
    """One line: what came out, and what is wrong with it."""
    widths = ", ".join(f"{n} x {width}" for width, n in sorted(usage.loads.items(), reverse=True))
    stores = ", ".join(f"{n} x {width}" for width, n in sorted(usage.stores.items(), reverse=True))
    return (
        f"sm_{target} {configuration.name}: {usage.instructions} instructions, {usage.registers} registers, "
        f"{usage.spilled} bytes spilled, {usage.shared} bytes shared, {usage.barriers} barriers, "
        f"loads of {widths} bits, stores of {stores} bits"
        + "".join(f"  <- {kind}: {what}" for kind, what in remaining.items())
    )


def check(index: int, target: int) -> tuple[str, bool]:
    """The line of one configuration, and whether it is as meant."""
    configuration = configurations()[index]
    usage = compile_configuration(configuration, target)
    found = faults(configuration, usage, target)
    remaining = excused(configuration.name, found, target, triton.__version__)
    return describe(configuration, usage, target, remaining), not remaining


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dwm_fast.kernels._compile", description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=int, default=90, choices=sorted(MAX_SHARED), help="90 means sm_90")
    parser.add_argument("--match", default="", help="only configurations whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    arguments = parser.parse_args()
    if INTERPRETED.value:
        parser.error("TRITON_INTERPRET=1 is set and leaves nothing to compile; unset it and run again")
    chosen = [i for i, known in enumerate(configurations()) if arguments.match in known.name]
    good = True
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(arguments.jobs, 1), mp_context=spawn) as pool:
        for line, ok in pool.map(functools.partial(check, target=arguments.target), chosen):
            print(line, flush=True)
            good = good and ok
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
