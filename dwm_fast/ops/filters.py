"""Filters of a convolution in the blocked order of oneDNN: laid out once, where torch does so in every call.

For filters that nobody changes that is much of a small convolution. They serve only calls that torch itself
would give to oneDNN as channels_last: what comes out is torch's own convolution bit for bit.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)

How = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Stride, padding, dilation and groups."""


class Filters:
    """Filters laid out for inputs like `x`, of which the shape counts; others are computed too, not faster than torch.

    Args:
        weight: (O, C / groups, KH, KW), fp32, on the CPU; it is copied.
        x, how: as in `fit`, which has to be True.

    Attributes:
        nbytes: what the laid out filters take; channels are filled up to whole blocks.
    """

    def __init__(self, weight: Tensor, x: Tensor, how: How) -> None:
        stride, padding, dilation, groups = how
        self._laid: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight, padding, stride, dilation, groups, list(x.shape)
        )
        self.nbytes = int(torch.ops.mkldnn._nbytes(self._laid))

    def conv2d(self, x: Tensor, bias: Tensor | None, how: How) -> Tensor:
        """The convolution, channels_last; only where `fit` says so."""
        stride, padding, dilation, groups = how
        y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, self._laid, bias, padding, stride, dilation, groups, "none", [], ""
        )
        return y


def fit(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> bool:
    """Whether filters of this weight may be laid out for x: fp32 on an x86 CPU, x channels_last, no gradient wanted,
    nobody listening, and torch would give the call to oneDNN too. What torch refuses is refused in its words.
    """
    if not (x.dtype is torch.float32 is weight.dtype and x.device.type == "cpu" == weight.device.type):
        return False
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last) or not _has_vendor():
        return False
    wanted = x.requires_grad or (bias is not None and (bias.requires_grad or bias.dtype is not torch.float32))
    if (wanted and torch.is_grad_enabled()) or type(x) not in _PLAIN or _somebody_listens():
        return False
    stride, padding, dilation, groups = how
    backend = torch._C._select_conv_backend(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    return bool(backend == torch._C._ConvBackend.Mkldnn)  # type: ignore[attr-defined]


def _somebody_listens() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


@functools.cache
def _has_vendor() -> bool:
    """Whether torch has oneDNN and the operations that its own compiler calls it by."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_nbytes")
    known = torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return known and platform.machine() in ("x86_64", "AMD64")
