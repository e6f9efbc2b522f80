"""What a compiled kernel is made of, read from what the tools of its compiler print; nothing here compiles."""

import collections
import dataclasses
import os
import re
import subprocess
import tempfile

import triton

from dwm_fast.kernels._configuration import Configuration

MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have, by target."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_RESOURCE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
_SERIALISED = "C7515"
"""ptxas: "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """What ptxas made of a configuration: instructions, registers and spilled bytes a thread, shared bytes a block.

    loads, stores: global accesses by width in bits; barriers: of a block; copies: asynchronous ones from global to
    shared memory; matrix: wgmma instructions; serialised: whether ptxas let each of them wait for the one before.
    """

    instructions: int
    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    barriers: int = 0
    copies: int = 0
    matrix: int = 0
    serialised: bool = False


def usage_of(disassembly: str, resources: str, log: str, shared: int) -> Usage:
    """From what nvdisasm, cuobjdump --dump-resource-usage and ptxas print, and Triton's bytes of shared memory."""
    words = [found.split(".") for found in _INSTRUCTION.findall(disassembly)]
    names = collections.Counter(name for name, *_ in words)
    found = {name: int(value) for name, value in _RESOURCE.findall(resources)}
    spilled = found["STACK"] + found["LOCAL"]
    if not spilled and (names["STL"] or names["LDL"]):
        spilled = 4 * (names["STL"] + names["LDL"])
    return Usage(
        len(words) - names["NOP"], found["REG"], spilled, shared, _accesses(words, "LDG"), _accesses(words, "STG"),
        names["BAR"], names["LDGSTS"], names["HGMMA"], _SERIALISED in log,
    )  # fmt: skip


def _accesses(words: list[list[str]], name: str) -> dict[int, int]:
    widths = [next((_WIDTHS[m] for m in rest if m in _WIDTHS), 32) for first, *rest in words if first == name]
    return dict(collections.Counter(widths))


def faults(configuration: Configuration, usage: Usage, target: int) -> dict[str, str]:
    """What of the configuration is not as it is meant to be on a target: kind of fault -> what was found."""
    found = {}
    if usage.spilled:
        found["spills"] = f"{usage.spilled} bytes a thread are spilled to local memory"
    if usage.shared > MAX_SHARED[target]:
        found["too much shared memory"] = f"{usage.shared} bytes; a block has {MAX_SHARED[target]}"
    for kind, (width, least), counts in (
        ("narrow loads", configuration.loads, usage.loads),
        ("narrow stores", configuration.stores, usage.stores),
    ):
        if counts.get(width, 0) < least:
            found[kind] = f"{counts.get(width, 0)} of {width} bits, expected {least}"
    most = configuration.barriers
    if most is not None and (usage.barriers > most or (usage.shared > 0 and most == 0)):
        found["shared memory"] = f"{usage.shared} bytes and {usage.barriers} barriers, expected at most {most} barriers"
    if configuration.pipelined and target < 100 and not usage.copies:
        found["no asynchronous copies"] = "operands are loaded through registers"
    if configuration.matrix and target == 90:
        if not usage.matrix:
            found["no wgmma"] = "the product is made of other instructions"
        if usage.serialised:
            found["serialised"] = "ptxas let every wgmma wait for the one before (C7515)"
    return found


def read_usage(cubin: bytes, log: str, shared: int) -> Usage:
    """Usage of a binary, by the tools that Triton carries."""
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([os.path.join(folder, tool), option, file.name], capture_output=True, text=True, check=True)
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "--dump-resource-usage"))
        ]
    return usage_of(texts[0].stdout, texts[1].stdout, log, shared)
