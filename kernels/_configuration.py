"""What the compile gate compiles: one kernel with types and compile-time arguments, and what has to come out."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One kernel with types and compile-time arguments; argument types are in the kernel's order.

    Arguments in `constants` need no type: among them sizes and strides that are 1, which Triton compiles in. Integers
    in `aligned` are multiples of 16. What is meant, and held to:

    loads, stores: (bits, count): so many global accesses of that width at least stand in the code.
    barriers: so many at most; 0 means no shared memory either, None that it is used on purpose.
    matrix: sm_90's own matrix instructions (wgmma) are in it, and ptxas did not serialise them.
    pipelined: operands come by asynchronous copies.
    """

    name: str
    kernel: Any
    types: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    aligned: tuple[str, ...] = ()
    loads: tuple[int, int] = (128, 0)
    stores: tuple[int, int] = (128, 0)
    barriers: int | None = None
    matrix: bool = False
    pipelined: bool = False
