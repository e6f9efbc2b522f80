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
from dwm_fast.ops.bits import packed_nbytes
from dwm_fast.ops.registration import define
from dwm_fast.ops.ways import LARGE_WEIGHT, Problem, one_pass

_BLOCK_BYTES = 2 << 20
_BLOCK_ROWS = 128


def segments(offsets: Tensor, rows: int, samples: int) -> Iterator[tuple[int, slice]]:
    """(domain, rows of it) for every domain that has any, out of `rows` rows for `samples` samples."""
    scale = rows // samples if samples else 0
    bounds = offsets.tolist()
    for domain in range(len(bounds) - 1):
        if bounds[domain] < bounds[domain + 1]:
            yield domain, slice(bounds[domain] * scale, bounds[domain + 1] * scale)


def _bias_of(bias: Tensor | None, domain: int) -> Tensor | None:
    return bias[domain] if bias is not None and bias.dim() == 2 else bias


def bank_linear_reference(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_zeros((rows.shape[0], weight.shape[0]))
    multiply_by_blocks(y, rows, weight, bits, bias, list(segments(offsets, rows.shape[0], samples)))
    return y.view(*x.shape[:-1], weight.shape[0])


def multiply_by_blocks(
    y: Tensor, rows: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, parts: list[tuple[int, slice]]
) -> None:
    """y[part] = rows[part] (W * bits[domain])^T + the domain's bias for each (domain, part), by torch's own product."""
    for block, where in _row_blocks(weight):
        for domain, part in parts:
            masked = apply_bits(bits[domain, where], [weight[block]])[0].to(rows.dtype)
            shift = _bias_of(bias, domain)
            y[part, block] = F.linear(rows[part], masked, None if shift is None else shift[block])


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
    if not multiplies_bits(weight) or autocast_dtype(x) != torch.float32:
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    return rows > 0 and one_pass(Problem("linear_packed", "cpu", torch.float32, rows, *weight.shape))


def product_by_blocks(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    """x (W * bits[0])^T + bias for one domain by torch's product, the masked weight never there as a whole if large."""
    if len(_row_blocks(weight)) == 1:
        return F.linear(x, apply_bits(bits[0], [weight])[0].to(x.dtype), bias)
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty((rows.shape[0], weight.shape[0]))
    multiply_by_blocks(y, rows, weight, bits, bias, [(0, slice(0, rows.shape[0]))])
    return y.view(*x.shape[:-1], weight.shape[0])


def _row_blocks(weight: Tensor) -> list[tuple[slice, slice]]:
    """Blocks of the weight's rows that stay in a CPU's cache while all domains use them, and their packed bytes.

    A domain's part of a block is masked and multiplied before the next is touched. 2 MB was fastest of 0.5 to 8 MB
    at 4096 x 4096, 16 domains of 4 rows, on an AMD EPYC with 32 MB of third-level cache. Blocks hold multiples of
    128 rows, so that their bits begin at a 16-byte boundary and a product does not depend on the blocking.
    """
    n, k = weight.shape
    nbytes = packed_nbytes(weight.numel())
    per_row = k * weight.element_size()
    rows = max(_BLOCK_BYTES // max(per_row, 1) // _BLOCK_ROWS, 1) * _BLOCK_ROWS
    if weight.device.type != "cpu" or not weight.is_contiguous() or n * per_row <= 2 * _BLOCK_BYTES:
        rows = max(n, 1)
    starts = list(range(0, max(n - _BLOCK_ROWS, 0) + 1, rows))
    bounds = zip(starts, [*starts[1:], n], strict=True)
    return [(slice(i, j), slice(i * k // 8, j * k // 8 if j < n else nbytes)) for i, j in bounds]


def bank_conv2d_reference(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    geometry = (list(stride), list(padding), list(dilation), groups)
    y: Tensor | None = None
    for domain, part in segments(offsets, x.shape[0], samples):
        masked = apply_bits(bits[domain], [weight])[0].to(x.dtype)
        result = F.conv2d(x[part], masked, _bias_of(bias, domain), *geometry)
        if y is None:
            empty = result.new_zeros((x.shape[0], *result.shape[1:]))
            y = empty.contiguous(memory_format=_memory_format(result))
        y[part] = result
    return F.conv2d(x, weight.to(x.dtype), _bias_of(bias, 0), *geometry) if y is None else y


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _conv2d_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *_, stride, padding, dilation, groups = rest
    return F.conv2d(x, weight.to(x.dtype), None, list(stride), list(padding), list(dilation), groups)


define(
    "bank_linear(Tensor x, Tensor weight, Tensor bits, Tensor? bias, Tensor offsets, SymInt samples) -> Tensor",
    reference=bank_linear_reference,
    fake=_linear_fake,
)
define(
    "bank_conv2d(Tensor x, Tensor weight, Tensor bits, Tensor? bias, Tensor offsets, SymInt samples, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
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
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def of_part(g: Tensor, part: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g, part, masked, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False]
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
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> (Tensor, Tensor, Tensor)",
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


def _check(rows: int, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int) -> None:
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
            1] use mask d. Samples beyond the last offset give undefined rows.
        samples: number of samples in the batch.

    Returns:
        (..., N) in x's dtype. On the CPU in fp32 it is bit for bit what `linear_packed` gives domain by
        domain.
    """
    _check(x.numel() // max(x.shape[-1], 1), weight, bits, bias, offsets, samples)
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
    _check(x.shape[0], weight, bits, bias, offsets, samples)
    result: Tensor = torch.ops.dwm_fast.bank_conv2d(
        x, weight, bits, bias, offsets, samples, list(stride), list(padding), list(dilation), groups
    )
    return result
