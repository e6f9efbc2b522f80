"""Every operation once on small odd shapes on a GPU: what compute-sanitizer is run over.

compute-sanitizer --tool memcheck python -m benchmarks.dev.sanitize [PART ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import dwm_fast
from dwm_fast import ops
from dwm_fast.optim import FrozenAdamW, FrozenSGD

_SHAPES = ((1,), (127,), (129, 3), (5, 3, 3, 3), (16, 8, 3, 3), (33, 257))


def _sampling(device: torch.device) -> None:
    weights = [torch.randn(s, device=device) for s in _SHAPES]
    logits = [torch.randn(s, device=device, requires_grad=True) for s in _SHAPES]
    state, tau = torch.tensor([7, 1], device=device), torch.tensor(1.0, device=device)
    for mode in ops.Mode:
        for dtype in (torch.float32, torch.bfloat16):
            masked, _, penalty = ops.sample(
                logits, weights, state, tau, mode=mode, thresholds=[0.5] * len(weights), dtype=dtype, pack=True
            )
            loss = sum((m.float().sum() for m in masked), penalty)
            if loss.requires_grad:
                torch.autograd.backward(loss)


def _bits(device: torch.device) -> None:
    masks = [torch.rand(s, device=device) < 0.5 for s in _SHAPES]
    numels = [m.numel() for m in masks]
    a, b = ops.pack(masks), ops.pack([~m for m in masks])
    ops.apply(a, [torch.randn(s, device=device) for s in _SHAPES])
    assert all(torch.equal(x, m.reshape(-1)) for x, m in zip(ops.unpack(a, numels), masks, strict=True))
    ops.count(a, numels)
    for op in ("and", "or", "xor", "andnot"):
        ops.combine(a, b, op)
    ops.overlap(a, b, numels)


def _updates(device: torch.device) -> None:
    for make in (FrozenAdamW, lambda p, **o: FrozenSGD(p, momentum=0.9, **o)):
        for compact in (False, True):
            params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in _SHAPES]
            keep = [torch.rand(s, device=device) < 0.5 for s in _SHAPES]
            optimizer = make(params, lr=1e-2, keep=keep, compact=compact)
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer.step()


def _network(device: torch.device) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten(), torch.nn.Linear(180, 7)).to(device)
    masked = dwm_fast.mask_model(net, dwm_fast.GumbelSigmoid(), seed=1).train()
    optimizer = dwm_fast.optim.MaskAdam(masked, coefficient=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(masked(torch.randn(2, 3, 8, 8, device=device)).square().mean())
        optimizer.step()


def _products(device: torch.device) -> None:
    for rows, n, k in ((1, 33, 65), (7, 64, 128), (17, 100, 257)):
        mask = torch.rand(n, k, device=device) < 0.5
        x, weight = torch.randn(rows, k, device=device), torch.randn(n, k, device=device)
        ops.linear_packed(x, weight, ops.pack([mask]))
        both = torch.stack([ops.pack([mask]), ops.pack([~mask])])
        offsets = torch.tensor([0, rows // 2, rows], device=device)
        _bank(x, weight, both, offsets)


def _one_pass(device: torch.device) -> None:
    """Every kernel of a masked product, forced: tails in all dimensions, split sums, single rows, strides."""
    state, tau = torch.tensor([7, 1], device=device), torch.tensor(1.0, device=device)
    with ops.use_way("one-pass"):
        for rows, n, k in ((1, 33, 65), (1, 64, 4096), (7, 64, 512), (17, 100, 257), (70, 130, 96)):
            for dtype in (torch.float32, torch.bfloat16):
                weight, bias = torch.randn(n, k, device=device).to(dtype), torch.randn(n, device=device).to(dtype)
                x = torch.randn(k, rows, device=device).t().to(dtype).requires_grad_(True)
                logits = torch.randn(n, k, device=device, requires_grad=True)
                y = ops.linear_packed(x, weight.requires_grad_(True), ops.pack([logits > 0]), bias)
                torch.autograd.backward((y + ops.linear(x, weight, logits, bias, state, tau)).sum())
        for window, groups, last in ((3, 1, True), (1, 1, True), (2, 2, False)):
            weight = torch.randn(6, 4 // groups, window, window, device=device, requires_grad=True)
            x = torch.randn(2, 4, 9, 7, device=device)
            x = x.to(memory_format=torch.channels_last) if last else x
            logits = torch.randn(weight.shape, device=device, requires_grad=True)
            where: dict[str, Any] = {}
            if window > 1:
                where = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": groups}
            y = ops.conv2d_packed(x.requires_grad_(True), weight, ops.pack([logits > 0]), None, **where)
            torch.autograd.backward((y + ops.conv2d(x, weight, logits, None, state, tau, **where)).sum())


def _bank(x: Tensor, weight: Tensor, bits: Tensor, offsets: Tensor) -> None:
    from dwm_fast.ops.bank import bank_linear

    bank_linear(x, weight, bits, None, offsets, x.shape[0])


PARTS = {part.__name__.strip("_"): part for part in (_sampling, _bits, _updates, _network, _products, _one_pass)}


def run(names: Sequence[str], device: torch.device) -> None:
    """Run the parts called `names`, all of them by default."""
    for name in names or PARTS:
        PARTS[name](device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"sanitize: {name} done", flush=True)


if __name__ == "__main__":
    run(sys.argv[1:], torch.device("cuda"))
