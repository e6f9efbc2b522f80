"""Every operation once on small odd shapes on a GPU: what compute-sanitizer is run over.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
"""

from __future__ import annotations

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
                loss.backward()


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
        masked(torch.randn(2, 3, 8, 8, device=device)).square().mean().backward()
        optimizer.step()


def _products(device: torch.device) -> None:
    for rows, n, k in ((1, 33, 65), (7, 64, 128), (17, 100, 257)):
        mask = torch.rand(n, k, device=device) < 0.5
        x, weight = torch.randn(rows, k, device=device), torch.randn(n, k, device=device)
        ops.linear_packed(x, weight, ops.pack([mask]))
        both = torch.stack([ops.pack([mask]), ops.pack([~mask])])
        offsets = torch.tensor([0, rows // 2, rows], device=device)
        _bank(x, weight, both, offsets)


def _bank(x: Tensor, weight: Tensor, bits: Tensor, offsets: Tensor) -> None:
    from dwm_fast.ops.bank import bank_linear

    bank_linear(x, weight, bits, None, offsets, x.shape[0])


def main() -> None:
    device = torch.device("cuda")
    for part in (_sampling, _bits, _updates, _network, _products):
        part(device)
        torch.cuda.synchronize()
        print(f"sanitize: {part.__name__.strip('_')} done", flush=True)


if __name__ == "__main__":
    main()
