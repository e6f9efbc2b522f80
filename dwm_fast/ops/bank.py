"""bank_linear, bank_conv2d: one base weight, a batch sorted by domain, one packed mask per domain.

Samples `offsets[d] : offsets[d + 1]` of the batch belong to domain d, whose bits are row d of `bits`. On a
device the offsets are read there: their values may change between replays of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops import backends
from dwm_fast.ops.autocast import autocast_dtype
from dwm_fast.ops.bits import apply as apply_bits
from dwm_fast.ops.blocks import bias_of, multiply_by_blocks
from dwm_fast.ops.geometry import Geometry
from dwm_fast.ops.packing import packed_nbytes
from dwm_fast.ops.problem import cpu_problem
from dwm_fast.ops.registration import define
from dwm_fast.ops.transforms import refuse_forward_mode, transformed
from dwm_fast.ops.ways import LARGE_WEIGHT, one_pass


def segments(offsets: Tensor, rows: int, samples: int) -> Iterator[tuple[int, slice]]:
    """(domain, rows of it) for every domain that has any, out of `rows` rows for `samples` samples.

    InputError unless the offsets rise from 0 to `samples`: every row belongs to one domain.
    """
    scale = rows // samples if samples else 0
    bounds = offsets.tolist()
    if [*bounds[:1], *bounds[-1:]] != [0, samples] or bounds != sorted(bounds):
        shown = str(bounds[:20])[:-1] + (", ...]" if len(bounds) > 20 else "]")
        raise InputError(
            f"offsets are {shown}; expected numbers that rise from 0 to {samples}, the samples of the batch"
        )
    for domain in range(len(bounds) - 1):
        if bounds[domain] < bounds[domain + 1]:
            yield domain, slice(bounds[domain] * scale, bounds[domain + 1] * scale)


def bank_linear_reference(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_zeros((rows.shape[0], weight.shape[0]))
    multiply_by_blocks(y, rows, weight, bits, bias, list(segments(offsets, rows.shape[0], samples)))
    return y.view(*x.shape[:-1], weight.shape[0])


def is_large(weight: Tensor) -> bool:
    """Whether a linear layer's weight is one that networks multiply from bits where that can be done."""
    large = weight.dim() == 2 and weight.numel() >= LARGE_WEIGHT
    return large and weight.dtype == torch.float32 and weight.device.type == "cpu"


def multiplies_bits(weight: Tensor) -> bool:
    """Whether few rows of x are multiplied with this weight straight from bits: it is large, and the extension there.

    Smaller weights stay in a cache once they are masked: torch's product of them costs less than reading bits again
    in every call.
    """
    return is_large(weight) and backends.chosen("linear_packed", "cpu") == "cpp"


def reads_bits(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., K) is multiplied with `weight` (N, K) straight from bits."""
    if not multiplies_bits(weight) or transformed() or autocast_dtype(x) != torch.float32:
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    return rows > 0 and one_pass(cpu_problem("linear_packed", weight, weight, rows))


def bank_conv2d_reference(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int,
    geometry: Geometry,
) -> Tensor:  # fmt: skip
    y: Tensor | None = None
    for domain, part in segments(offsets, x.shape[0], samples):
        masked = apply_bits(bits[domain], [weight])[0].to(x.dtype)
        result = F.conv2d(x[part], masked, bias_of(bias, domain), *geometry.flat())
        if y is None:
            empty = result.new_zeros((x.shape[0], *result.shape[1:]))
            y = empty.contiguous(memory_format=_memory_format(result))
        y[part] = result
    return F.conv2d(x, weight.to(x.dtype), bias_of(bias, 0), *geometry.flat()) if y is None else y


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _conv2d_fake(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int, geometry: Geometry
) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), None, *geometry.flat())


define(
    "bank_linear(Tensor x, Tensor weight, Tensor bits, Tensor? bias, Tensor offsets, SymInt samples) -> Tensor",
    reference=bank_linear_reference,
    fake=_linear_fake,
)
define(
    "bank_conv2d(Tensor x, Tensor weight, Tensor bits, Tensor? bias, Tensor offsets, SymInt samples, "
    f"{Geometry.SCHEMA}) -> Tensor",
    reference=bank_conv2d_reference,
    fake=_conv2d_fake,
)

_Gradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, offsets: Tensor, samples: int, of_part: _Gradients
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and a bias per domain; `of_part(grad, x, masked)` gives the first two for its rows."""
    dx, dw = torch.zeros_like(x), torch.zeros_like(weight)
    db = grad.new_zeros((bits.shape[0], weight.shape[0]))
    for domain, part in segments(offsets, x.shape[0], samples):
        masked = apply_bits(bits[domain], [weight])[0].to(x.dtype)
        dx[part], dense = of_part(grad[part], x[part], masked)
        dw += apply_bits(bits[domain], [dense.to(weight.dtype)])[0]
        db[domain] = grad[part].sum([d for d in range(grad.dim()) if d != 1])
    return dx, dw, db


def bank_linear_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, offsets: Tensor, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    dx, dw, db = _gradients(
        grads, rows, weight, bits, offsets, samples, lambda g, part, masked: (g @ masked, g.t() @ part)
    )
    return dx.view(x.shape), dw, db


def bank_conv2d_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, offsets: Tensor, samples: int,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def of_part(g: Tensor, part: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g, part, masked, None, *geometry.flat()[:3], False, [0, 0], geometry.groups, [True, True, False]
        )
        return dx, dw

    return _gradients(grad, x, weight, bits, offsets, samples, of_part)


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), grad.new_empty((bits.shape[0], weight.shape[0]))


define(
    "bank_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor bits, Tensor offsets, SymInt samples) "
    "-> (Tensor, Tensor, Tensor)",
    reference=bank_linear_backward_reference,
    fake=_backward_fake,
)
define(
    "bank_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor bits, Tensor offsets, SymInt samples, "
    f"{Geometry.SCHEMA}) -> (Tensor, Tensor, Tensor)",
    reference=bank_conv2d_backward_reference,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bits, bias, offsets, ctx.samples, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, bits, offsets)
    ctx.bias_dim = 0 if bias is None else bias.dim()


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bits, offsets = ctx.saved_tensors
    name = "bank_conv2d_backward" if ctx.geometry else "bank_linear_backward"
    op = getattr(torch.ops.dwm_fast, name)
    dx, dw, db = op(grad, x, weight, bits, offsets, ctx.samples, *ctx.geometry)
    bias = (None, db.sum(0), db)[ctx.bias_dim]
    return dx, dw, None, bias, None, None, *([None] * len(ctx.geometry))


torch.library.register_autograd("dwm_fast::bank_linear", _backward, setup_context=_setup_context)
torch.library.register_autograd("dwm_fast::bank_conv2d", _backward, setup_context=_setup_context)


def check_bank(rows: int, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int) -> None:
    """InputError unless these fit each other as `bank_linear` and `bank_conv2d` say; of the weight the shape counts."""
    nbytes = packed_nbytes(weight.numel())
    if bits.dtype != torch.uint8 or bits.dim() != 2 or bits.shape[1] != nbytes or bits.stride(1) != 1:
        raise InputError(
            f"bits: given {bits.dtype} of shape {tuple(bits.shape)}; expected uint8 (domains, {nbytes}) "
            f"with packed rows, for a weight of shape {tuple(weight.shape)}"
        )
    if offsets.dtype != torch.int64 or offsets.shape != (bits.shape[0] + 1,):
        raise InputError(
            f"offsets: given {offsets.dtype} of shape {tuple(offsets.shape)}; expected int64 of shape "
            f"({bits.shape[0] + 1},), one more than the domains"
        )
    if samples < 0 or (rows % samples if samples else rows):
        raise InputError(f"x has {rows} rows, which {samples} samples do not divide")
    shapes = ((weight.shape[0],), (bits.shape[0], weight.shape[0]))
    if bias is not None and tuple(bias.shape) not in shapes:
        raise InputError(f"bias: given shape {tuple(bias.shape)}; expected {shapes[0]} or {shapes[1]}")


def bank_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int) -> Tensor:
    """Linear map of a batch whose samples have masks of different domains.

    Args:
        x: (..., K), samples sorted by domain; its rows (all dimensions but the last) are split evenly over
            samples.
        weight: (N, K), shared by all domains.
        bits: uint8 (D, packed_nbytes(N * K)), one packed mask per domain; rows may lie apart.
        bias: (N,), or (D, N) with one per domain, or None.
        offsets: int64 (D + 1,), on x's device, rising from 0 to `samples`: samples offsets[d] : offsets[d +
            1] use mask d. Anything else is an InputError on the CPU; a device does not look, and
            rows that no domain has are undefined there.
        samples: number of samples in the batch.

    Returns:
        (..., N) in x's dtype. On the CPU in fp32 it is bit for bit what `linear_packed` gives domain by
        domain.
    """
    check_bank(x.numel() // max(x.shape[-1], 1), weight, bits, bias, offsets, samples)
    refuse_forward_mode("bank_linear")
    result: Tensor = torch.ops.dwm_fast.bank_linear(x, weight, bits, bias, offsets, samples)
    return result


def bank_conv2d(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int, *,
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolution of a batch whose samples have masks of different domains.

    x: (B, C, H, W), NCHW or channels_last, sorted by domain; weight: (O, C / groups, KH, KW); the rest as in
    `bank_linear` and torch's conv2d. Returns (B, O, H', W') in x's dtype and memory format.
    """
    check_bank(x.shape[0], weight, bits, bias, offsets, samples)
    geometry = Geometry(stride, padding, dilation, groups)
    refuse_forward_mode("bank_conv2d")
    result: Tensor = torch.ops.dwm_fast.bank_conv2d(x, weight, bits, bias, offsets, samples, *geometry.flat())
    return result
