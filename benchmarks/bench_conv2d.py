"""conv2d: a convolution whose weight is masked by packed bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast import ops
from dwm_fast.ops import backends

from .context import Context
from .measure import Case, Way, require
from .rivals import unpacked


def packed(context: Context, rows: int, channels: int, pixels: int) -> Case:
    """3 x 3 convolution of ResNet's kind from packed bits."""
    device, dtype = context.device, context.compute_dtype
    x = torch.randn(rows, channels, pixels, pixels, device=device).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    if context.on_gpu:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    mask = torch.rand(weight.shape, device=device) < 0.7
    bits = ops.pack([mask])
    flops = 2 * rows * pixels * pixels * weight.numel()

    def dense(w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, 1, 1)

    def by_hand() -> Any:
        return dense(weight * unpacked(bits, weight.shape))

    def ours() -> Any:
        return ops.conv2d_packed(x, weight, bits, None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)

    def one_pass() -> Any:
        with ops.use_way("one-pass"):
            return ours()

    def gate() -> None:
        expected = dense(torch.where(mask, weight, torch.zeros_like(weight))).double()
        for found in (way.make()() for way in ways[1:]):
            error = float((found.double() - expected).abs().max() / expected.abs().max())
            require(error <= 4 * torch.finfo(dtype).eps, f"convolution is off by {error:.1e} of its largest entry")

    backend = backends.chosen("conv2d_packed", device.type)
    ways = [
        Way("dense convolution", lambda: lambda: dense(weight), flops=flops, graph=True),
        Way("eager: unpack, multiply, convolution", lambda: by_hand, flops=flops, graph=True),
        Way("ours", lambda: ours, flops=flops, graph=True, backend=backend),
    ]
    if context.on_gpu:
        ways.append(Way("ours, one pass", lambda: one_pass, flops=flops, graph=True, backend=backend))
    parameters = {"batch": rows, "channels": channels, "pixels": pixels, "kernel": 3, "dtype": str(dtype)[6:]}
    return Case("conv2d from bits", parameters, ways, gate)
