"""What the compile gate compiles: one kernel with types and compile-time arguments."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One kernel with types and compile-time arguments; argument types are in the kernel's order.

    Arguments in `constants` need no type: among them sizes and strides that are 1, which Triton compiles in. Integers
    in `aligned` are multiples of 16. `matrix`: sm_90's own matrix instructions have to be in it.
    """

    name: str
    kernel: Any
    types: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    aligned: tuple[str, ...] = ()
    matrix: bool = False
