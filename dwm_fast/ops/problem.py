"""Problem: one masked product by its sizes, as the rule of ways and the choice of tiles see it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dwm_fast.ops.geometry import Geometry

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that kernels multiply in one pass."""
ACTIVATIONS = ("none", "relu", "gelu", "silu")
"""What `linear_packed` may apply to its result; kernels know them by number."""
PACKED_ROWS = 64
"""One tile of M: bits are expanded once, and each weight is read once."""

_MAX_PIXELS = 2**31 - 2**16


def rows_of(x: Tensor) -> Tensor:
    """x (..., K) as a matrix (M, K), whatever is empty."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@dataclass(frozen=True)
class Problem:
    """One masked product: M rows of N outputs, each a sum over K (input gradients: of K outputs over N).

    Attributes:
        op: the operation's name; gradients of the weight or the logits have names that end in "_grad". A convolution
            that is a linear map of pixels (1x1 over channels_last images) has a linear map's name.
        device: "cuda", "interpreter" (Triton's, on CPU tensors), or "cpu", where the C++ extension computes.
        name: of the GPU, "" where there is none.
        dtype: compute dtype; tf32: whether fp32 products may use TF32.
        taps: elements of a convolution's window, 1 for a linear map; groups: of a convolution.
        obstacle: why these tensors are never computed in one pass, not even where that is forced (the staged way
            answers for them, with torch's own words where they do not fit); "" where they may be.
    """

    op: str
    device: str
    dtype: torch.dtype
    m: int
    n: int
    k: int
    tf32: bool = False
    taps: int = 1
    groups: int = 1
    name: str = ""
    obstacle: str = ""

    @property
    def packed(self) -> bool:
        """Whether the mask is read from bits."""
        return "_packed" in self.op

    @property
    def linear(self) -> bool:
        """Whether it is a linear map, of rows or of pixels."""
        return self.op.startswith("linear")


def matmul_tf32() -> bool:
    """Whether torch's own setting gives fp32 matrix products to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def convolution_tf32() -> bool:
    """Whether torch's own setting gives fp32 convolutions to TF32."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


@functools.cache
def device_name(device: torch.device) -> str:
    """A GPU's name, under which a table of it is found."""
    return torch.cuda.get_device_name(device)


def problem_of(
    op: str, backend: str, x: Tensor, weight: Tensor, logits: Tensor | None = None, geometry: Geometry | None = None
) -> Problem:
    """The problem that `backend` would solve in one pass.

    Args:
        op: name of the operation.
        backend: "cpp", "triton" or "cuda".
        x: input or incoming gradient; its shape, dtype and memory format count.
        weight: its device counts too.
        logits: where the mask is drawn. geometry: of a convolution, whose x is the input in every direction.
    """
    if backend == "cpp":
        return cpu_problem(op, x, weight, math.prod(x.shape[:-1]))
    where, name = ("cuda", device_name(weight.device)) if weight.is_cuda else ("interpreter", "")
    dtype = x.dtype if weight.dtype in FLOATS else weight.dtype
    obstacle = ""
    if logits is not None and logits.dtype != torch.float32:
        obstacle = f"one-pass kernels take logits of float32, not {logits.dtype}"
    if op == "linear_kept" and x.dtype != weight.dtype:
        obstacle = f"the kernel of kept weights takes values of the input's dtype, {x.dtype}, not {weight.dtype}"
    if geometry is None:
        m, (n, k) = math.prod(x.shape[:-1]), weight.shape
        return Problem(op, where, dtype, m, n, k, matmul_tf32(), name=name, obstacle=obstacle)
    rows, columns = geometry.output(x.shape, weight.shape)
    if not rows * columns:
        obstacle = "the window is larger than the padded input"
    m, taps = x.shape[0] * rows * columns, weight.shape[2] * weight.shape[3]
    if max(m, x.shape[0] * x.shape[2] * x.shape[3]) > _MAX_PIXELS:
        obstacle = f"pixels are counted in int32, at most {_MAX_PIXELS}"
    plain = geometry.groups == 1 and geometry.flat()[:2] == ([1, 1], [0, 0])
    if plain and taps == 1 and x.permute(0, 2, 3, 1).is_contiguous():
        op = op.replace("conv2d", "linear")
    n, k = weight.shape[0] // geometry.groups, weight.shape[1] * taps
    return Problem(op, where, dtype, m, n, k, convolution_tf32(), taps, geometry.groups, name, obstacle)


def cpu_problem(op: str, x: Tensor, weight: Tensor, rows: int) -> Problem:
    """`rows` rows of x times `weight`, computed by the C++ extension."""
    plain = x.dtype != torch.float32 and weight.dtype in FLOATS
    return Problem(op, "cpu", x.dtype if plain else weight.dtype, rows, *weight.shape)
