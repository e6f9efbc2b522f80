"""Filters of a convolution in the blocked order of oneDNN: laid out once, where torch does so in every call.

For filters that nobody changes that is much of a small convolution. They serve only calls that torch itself
would give to oneDNN: what comes out is torch's own convolution bit for bit, in either memory format of the images.
"""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.ops.transforms import transformed

_PLAIN = (Tensor, torch.nn.Parameter)

How = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
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


class Blocked:
    """The same for contiguous (NCHW) inputs: torch brings these into blocks of channels, and back, in every call.

    Args:
        weight: as `fit_blocked` wants it; it is copied.
        x, how: as in `fit_blocked`, which has to be True.

    Attributes:
        how: what it was made for.
        nbytes: what the laid out filters take.
    """

    def __init__(self, weight: Tensor, x: Tensor, how: How) -> None:
        self.how = how
        self.nbytes = weight.numel() * weight.element_size()
        self._laid = torch.ops.mkldnn_prepacked.conv2d_prepack.default(
            weight, None, how[0], how[1], how[2], how[3], list(x.shape), "none"
        )

    def conv2d(self, x: Tensor) -> Tensor:
        """The convolution, contiguous; only where `fit_blocked` says so."""
        y: Tensor = torch.ops.mkldnn_prepacked.conv2d_run.default(x, self._laid)
        return y


class Plain:
    """A masked weight that is not laid out, in the memory format of the last images: torch would bring it there.

    A weight that was given in channels_last stays so. The convolution's output has the same bits in either format.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        first = weight.dim() == 4 and weight.is_contiguous()
        self._turns = first and not weight.is_contiguous(memory_format=torch.channels_last)

    def conv2d(self, x: Tensor, bias: Tensor | None, how: How) -> Tensor:
        """The convolution of x, in the weight's dtype."""
        weight = self.weight
        # Of a batch of torch.func.vmap nobody can ask for its memory format.
        if self._turns and not transformed() and is_last(x) == weight.is_contiguous():
            # Under inference mode it would be a tensor that no later call can take a gradient through.
            with torch.inference_mode(False), torch.no_grad():
                wanted = torch.channels_last if weight.is_contiguous() else torch.contiguous_format
                self.weight = weight = weight.contiguous(memory_format=wanted)
        return F.conv2d(x, weight, bias, *how)


def is_last(x: Tensor) -> bool:
    """Whether x is channels_last, and not contiguous at once."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


_BLOCK = 16
"""Channels of a block: filters of whole blocks take no more bytes laid out than plain."""


def fit_blocked(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> bool:
    """Whether filters of this weight may be laid out for x, contiguous; the rest as in `fit`.

    The weight is contiguous, larger than 1 x 1, of one group and of whole blocks of channels, and there is no bias.
    """
    if bias is not None or how[3] != 1 or weight.shape[0] % _BLOCK or weight.shape[1] % _BLOCK:
        return False
    if not (x.dtype is torch.float32 is weight.dtype and x.device.type == "cpu" == weight.device.type):
        return False
    if (x.requires_grad and torch.is_grad_enabled()) or type(x) not in _PLAIN or _somebody_listens():
        return False
    if not (_is_first(x) and _is_first(weight) and _has_prepacked()):
        return False
    return _goes_to_vendor(x, weight, bias, how)


def _is_first(x: Tensor) -> bool:
    """Whether x is contiguous, and not channels_last at once."""
    return x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)


def fit(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> bool:
    """Whether filters of this weight may be laid out for x: fp32 on an x86 CPU, x channels_last, no gradient wanted,
    nobody listening, and torch would give the call to oneDNN too. What torch refuses is refused in its words.
    """
    if not (x.dtype is torch.float32 is weight.dtype and x.device.type == "cpu" == weight.device.type):
        return False
    wanted = x.requires_grad or (bias is not None and (bias.requires_grad or bias.dtype is not torch.float32))
    if (wanted and torch.is_grad_enabled()) or type(x) not in _PLAIN or _somebody_listens():
        return False
    if not is_last(x) or not _has_vendor():
        return False
    return _goes_to_vendor(x, weight, bias, how)


def _goes_to_vendor(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> bool:
    stride, padding, dilation, groups = how
    backend = torch._C._select_conv_backend(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    return bool(backend == torch._C._ConvBackend.Mkldnn)  # type: ignore[attr-defined]


def _somebody_listens() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or transformed()
        or torch._C._get_tracing_state() is not None
    )


@functools.cache
def _has_vendor() -> bool:
    """Whether torch has oneDNN and the operations that its own compiler calls it by."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_nbytes")
    known = torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return known and platform.machine() in ("x86_64", "AMD64")


@functools.cache
def _has_prepacked() -> bool:
    """Whether torch has the operations that TorchScript calls oneDNN by."""
    known = all(hasattr(torch.ops.mkldnn_prepacked, name) for name in ("conv2d_prepack", "conv2d_run"))
    return known and _has_vendor()
