"""linear: a product whose weight is masked by packed bits or by a drawn mask, few rows to many."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dwm_fast
from dwm_fast import ops
from dwm_fast.ops import backends

from .context import Context
from .measure import Case, Run, Way, require
from .rivals import gumbel_mask, unpacked


def packed_bytes(rows: int, n: int, k: int, element: int) -> int:
    """Read x, weight and bits, write y."""
    return element * (rows * k + n * k + rows * n) + n * k // 8


def close_to(found: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> None:
    """GateRed unless `found` is x (W * m)^T within twice the error of torch's own product, against fp64."""
    masked = torch.where(mask, weight, torch.zeros_like(weight))
    exact = x.double() @ masked.double().t()
    own = (F.linear(x, masked).double() - exact).abs().max()
    budget = 2 * (own + torch.finfo(x.dtype).eps * exact.abs().max())
    error = (found.double() - exact).abs().max()
    require(bool(error <= budget), f"product is off by {float(error):.2e}; budget {float(budget):.2e}")


def packed(context: Context, rows: int) -> Case:
    """y = x (W * m)^T from packed bits: the way that the rule chooses, and on a GPU each by force."""
    n = k = 2048 if context.quick and not context.on_gpu else 4096
    device, dtype = context.device, context.compute_dtype
    x, weight = torch.randn(rows, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    mask = torch.rand(n, k, device=device) < 0.7
    bits = ops.pack([mask])
    element = weight.element_size()
    flops = 2 * rows * n * k

    def by_hand() -> Any:
        return F.linear(x, weight * unpacked(bits, weight.shape))

    def staged() -> Any:
        return F.linear(x, ops.apply(bits, [weight])[0])

    def one_pass() -> Any:
        with ops.use_way("one-pass"):
            return ops.linear_packed(x, weight, bits)

    backend = backends.chosen("linear_packed", device.type)
    moved = packed_bytes(rows, n, k, element)
    ways = [
        Way("dense product", lambda: lambda: F.linear(x, weight), moved - n * k // 8, flops, graph=True),
        Way("eager: unpack, multiply, product", lambda: by_hand, moved, flops, graph=True),
        Way("ours", lambda: lambda: ops.linear_packed(x, weight, bits), moved, flops, graph=True, backend=backend),
        Way(
            "ours, apply then dense",
            lambda: staged,
            moved,
            flops,
            graph=True,
            backend=backends.chosen("apply", device.type),
        ),
    ]
    if context.on_gpu:
        ways.append(Way("ours, one pass", lambda: one_pass, moved, flops, graph=True, backend=backend))

    def gate() -> None:
        for way in ways[1:]:
            close_to(way.make()(), x, weight, mask)

    parameters = {"M": rows, "N": n, "K": k, "dtype": str(dtype)[6:]}
    return Case("linear from bits", parameters, ways, gate)


ROTATED = 3
"""Weights that the calls of a way take in turn, so that no cache holds the next one: 201 MB of dense fp32 ones."""


def in_turn(calls: Sequence[Run]) -> Run:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def kept(context: Context, rows: int, share: float, dtype: torch.dtype) -> Case:
    """y = x (W * m)^T from the kept weights alone, beside torch's dense product of the same dtype; weights in turn."""
    n = k = 2048 if context.quick else 4096
    device = context.device
    x = torch.randn(rows, k, device=device).to(dtype)
    weights = [torch.randn(n, k, device=device).to(dtype) for _ in range(ROTATED)]
    masks = [torch.rand(n, k, device=device) < share for _ in weights]
    bits = [ops.pack([mask]) for mask in masks]
    stored = [ops.keep_values(w, b) for w, b in zip(weights, bits, strict=True)]
    element, flops = weights[0].element_size(), 2 * rows * n * k
    dense = element * (rows * k + n * k + rows * n)
    held = sum(element * v.numel() + 8 * starts.numel() + n * k // 8 for v, starts in stored) // ROTATED

    by_kept = [partial(ops.linear_kept, x, *s, b) for s, b in zip(stored, bits, strict=True)]
    from_bits = [partial(ops.linear_packed, x, w, b) for w, b in zip(weights, bits, strict=True)]

    def gate() -> None:
        close_to(by_kept[0](), x, weights[0], masks[0])

    ways = [
        Way("dense product", lambda: in_turn([partial(F.linear, x, w) for w in weights]), dense, flops),
        Way("all weights and bits", lambda: in_turn(from_bits), dense + n * k // 8, flops),
        Way("ours", lambda: in_turn(by_kept), dense - element * n * k + held, flops,
            backend=backends.chosen("linear_kept", device.type)),
    ]  # fmt: skip
    parameters = {"M": rows, "N": n, "K": k, "kept": share, "dtype": str(dtype)[6:], "weights": ROTATED}
    return Case("linear from kept weights", parameters, ways, gate)


class _Mlp(nn.Module):
    """A Llama's MLP with its norm and residual sum."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        down: Tensor = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + down


def tokens(context: Context, share: float) -> Case:
    """Token by token through the MLPs of a small Llama: gate, up and down projections, residual sums, RMS norms."""
    width, hidden, depth, steps = (1024, 2816, 2, 4) if context.quick else (2048, 5632, 4, 8)

    model = nn.Sequential(*(_Mlp(width, hidden) for _ in range(depth))).eval()
    masked = dwm_fast.mask_model(model, dwm_fast.Threshold())
    with torch.no_grad():
        for logits in masked.mask_parameters():
            logits.copy_(share - torch.rand_like(logits))
    start, merged = torch.randn(1, width), dwm_fast.merge(masked).eval()

    def generate(network: nn.Module) -> Run:
        def run() -> Tensor:
            x = start
            with torch.inference_mode():
                for _ in range(steps):
                    x = F.normalize(network(x)) * width**0.5
            return x

        return run

    ours = generate(dwm_fast.pack(masked, values="kept"))

    def gate() -> None:
        expected = generate(merged)()
        error = float((ours() - expected).abs().max() / expected.abs().max())
        require(error < 1e-3, f"the last state is off by {error:.1e} of its largest entry")

    ways = [
        Way("dense network, a masked copy of its own", lambda: generate(merged)),
        Way("all weights and bits", lambda: generate(dwm_fast.pack(masked, values="all"))),
        Way("ours", lambda: ours, backend=backends.chosen("linear_kept", "cpu")),
    ]
    parameters = {"width": width, "hidden": hidden, "layers": depth, "tokens": steps, "kept": share, "dtype": "float32"}
    return Case("tokens through MLPs from kept weights", parameters, ways, gate)


def drawn(context: Context, rows: int) -> Case:
    """y = x (W * m)^T and its gradients, the mask drawn on the way."""
    n = k = 2048 if context.quick and not context.on_gpu else 4096
    device, dtype = context.device, context.compute_dtype
    x = torch.randn(rows, k, device=device).to(dtype).requires_grad_(True)
    weight, bias = torch.randn(n, k, device=device).to(dtype), None
    logits = torch.randn(n, k, device=device).add_(2).requires_grad_(True)
    state, tau = torch.tensor([7, 1], device=device), torch.tensor(1.0, device=device)
    grad = torch.randn(rows, n, device=device).to(dtype)

    def step(way: str | None) -> Any:
        with ops.use_way(way):
            y = ops.linear(x, weight, logits, bias, state, tau)
            return (y, *torch.autograd.grad(y, [x, logits], grad))

    def by_force(way: str) -> Run:
        return lambda: step(way)

    def by_hand() -> Any:
        y = F.linear(x, weight * gumbel_mask(logits).to(dtype))
        return (y, *torch.autograd.grad(y, [x, logits], grad))

    def gate() -> None:
        with torch.no_grad():
            kept = ops.sample([logits], [weight], state, tau, dtype=dtype)[0][0] != 0
        close_to(step(None)[0].detach(), x.detach(), weight, kept)

    backend, flops = backends.chosen("linear", device.type), 6 * rows * n * k
    ways = [
        Way("eager: draw, multiply, products", lambda: by_hand, flops=flops, graph=True),
        Way("ours", lambda: lambda: step(None), flops=flops, graph=True, backend=backend),
    ]
    if context.on_gpu:
        ways += [
            Way(f"ours, {way}", partial(by_force, way), flops=flops, graph=True, backend=backend) for way in ops.WAYS
        ]
    parameters = {"M": rows, "N": n, "K": k, "dtype": str(dtype)[6:]}
    return Case("linear with a drawn mask, forward and backward", parameters, ways, gate)
