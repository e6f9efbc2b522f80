"""bank: batches whose rows belong to different domains, one base weight, one packed mask each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dwm_fast
from dwm_fast import ops
from dwm_fast.ops import backends
from dwm_fast.ops.bank import bank_linear
from dwm_fast.ops.union import bytes_of

from .bench_linear import ROTATED, close_to, in_turn
from .context import Context
from .measure import Case, Run, Way, require
from .networks import batch, network
from .rivals import unpacked


def mixed_bytes(domains: int, rows: int, n: int, k: int, element: int) -> int:
    """Read x and the weight once and one mask per domain, write y."""
    return element * (domains * rows * (k + n) + n * k) + domains * n * k // 8


def linear(context: Context, domains: int, rows: int) -> Case:
    """A linear layer on `domains` domains of `rows` rows each."""
    n = k = 2048 if context.quick and not context.on_gpu else 4096
    device, dtype = context.device, context.compute_dtype
    total = domains * rows
    x, weight = torch.randn(total, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    masks = [torch.rand(n, k, device=device) < 0.7 for _ in range(domains)]
    bits = torch.stack([ops.pack([m]) for m in masks])
    offsets = torch.arange(0, total + 1, rows, device=device)
    parts = torch.split(x, rows)
    flops = 2 * total * n * k
    moved = mixed_bytes(domains, rows, n, k, weight.element_size())

    def make_copies() -> Run:
        copies = [torch.where(m, weight, torch.zeros_like(weight)) for m in masks]
        return lambda: torch.cat([F.linear(p, w) for p, w in zip(parts, copies, strict=True)])

    def unpacked_masks() -> Any:
        return torch.cat([F.linear(p, weight * m) for p, m in zip(parts, masks, strict=True)])

    def by_hand() -> Any:
        ways = zip(parts, bits, strict=True)
        return torch.cat([F.linear(p, weight * unpacked(b, weight.shape)) for p, b in ways])

    def ours() -> Any:
        return bank_linear(x, weight, bits, None, offsets, total)

    def gate() -> None:
        for d in (0, domains // 2, domains - 1):
            part = slice(d * rows, (d + 1) * rows)
            close_to(ours()[part], x[part], weight, masks[d])

    backend = backends.chosen("bank_linear", device.type)
    ways = [
        Way("one dense product, no masks", lambda: lambda: F.linear(x, weight), moved, flops, graph=True),
        Way("loop over domains, weight copies", make_copies, flops=flops, graph=True),
        Way("loop over domains, unpacked masks", lambda: unpacked_masks, flops=flops, graph=True),
        Way("loop over domains, unpack and multiply", lambda: by_hand, flops=flops, graph=True),
        Way("ours", lambda: ours, moved, flops, graph=backend != "reference", backend=backend),
    ]
    parameters = {"domains": domains, "rows": rows, "N": n, "K": k, "dtype": str(dtype)[6:]}
    return Case("bank linear", parameters, ways, gate)


def union(context: Context, domains: int) -> Case:
    """A linear layer on `domains` domains of four rows, by the union of what they keep; weights in turn.

    Of a weight they keep a quarter in common, and a twentieth each for itself.
    """
    rows, shared, own = 4, 0.25, 0.05
    n = k = 2048 if context.quick else 4096
    x = torch.randn(domains * rows, k)
    offsets, parts = torch.arange(0, len(x) + 1, rows), torch.split(x, rows)
    weights = [torch.randn(n, k) for _ in range(ROTATED)]
    places = [torch.rand(n, k) for _ in weights]
    owned = [(shared + d * own, shared + (d + 1) * own) for d in range(domains)]
    masks = [[(p < shared) | ((p >= low) & (p < high)) for low, high in owned] for p in places]
    bits = [torch.stack([ops.pack([mask]) for mask in of]) for of in masks]
    apart = [[ops.keep_values(w, b) for b in of] for w, of in zip(weights, bits, strict=True)]
    stored = [ops.keep_union(w, of) for w, of in zip(weights, bits, strict=True)]
    kept = [sum(len(values) for values, _ in of) // ROTATED for of in zip(*apart, strict=True)]
    read = bytes_of(n * k, 4, kept, sum(len(values) for values, _ in stored) // ROTATED)
    other, flops = 4 * len(x) * (n + k), 2 * len(x) * n * k

    def copies() -> Run:
        made = [[torch.where(m, w, 0.0) for m in of] for w, of in zip(weights, masks, strict=True)]
        return in_turn([partial(_each, F.linear, parts, of) for of in made])

    def of_each(at: int) -> Any:
        ways = zip(parts, apart[at], bits[at], strict=True)
        return torch.cat([ops.linear_kept(part, *store, b) for part, store, b in ways])

    def by_union(at: int) -> Any:
        return ops.bank_linear_union(x, *stored[at], bits[at], None, offsets, len(x))

    def gate() -> None:
        for d in range(domains):
            close_to(by_union(0)[d * rows : (d + 1) * rows], parts[d], weights[0], masks[0][d])
        require(torch.equal(by_union(0), of_each(0)), "the union and the kept weights of each give other bits")

    numbers = range(ROTATED)
    from_bits = [partial(bank_linear, x, w, of, None, offsets, len(x)) for w, of in zip(weights, bits, strict=True)]
    ways = [
        Way("one dense product, no masks", lambda: in_turn([partial(F.linear, x, w) for w in weights]), flops=flops),
        Way("loop over domains, weight copies", copies, flops=flops),
        Way("ours", lambda: in_turn([partial(by_union, i) for i in numbers]), read.union + other, flops,
            backend=backends.chosen("bank_linear_union", "cpu")),
        Way("ours, kept weights of each", lambda: in_turn([partial(of_each, i) for i in numbers]),
            read.separate + other, flops, backend=backends.chosen("linear_kept", "cpu")),
        Way("ours, all weights and bits", lambda: in_turn(from_bits), read.dense + other, flops,
            backend=backends.chosen("bank_linear", "cpu")),
    ]  # fmt: skip
    parameters = {"domains": domains, "rows": rows, "N": n, "K": k, "shared": shared, "own": own, "weights": ROTATED}
    return Case("bank linear from a union", parameters, ways, gate)


def _each(product: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([product(part, weight) for part, weight in zip(parts, weights, strict=True)])


def serving(context: Context, pixels: int) -> Case:
    """ResNet-18 inference on a batch of four domains, four images each."""
    model = network("resnet18", context.device)
    names = ["photo", "art", "cartoon", "sketch"]
    bank = dwm_fast.MaskBank(model)
    weights = {there.full_name: there.weight for there in dwm_fast.nn.maskable_weights(model).values()}
    masks = {d: {n: torch.rand(w.shape, device=w.device) < 0.7 for n, w in weights.items()} for d in names}
    for name in names:
        bank.add(name, masks[name])
    images, _ = batch("resnet18", 16, pixels, context.device)
    rows = [names[i % 4] for i in range(16)]
    ids = torch.arange(16, device=context.device) % 4
    served = bank.serve(names)

    @torch.inference_mode()
    def dense() -> Any:
        return model(images)

    def make_networks() -> Run:
        networks = [network("resnet18", context.device) for _ in names]
        with torch.no_grad():
            for name, copy in zip(names, networks, strict=True):
                for n, mask in masks[name].items():
                    copy.get_parameter(n).mul_(mask)

        @torch.inference_mode()
        def run() -> Any:
            out = [copy(images[d::4]) for d, copy in enumerate(networks)]
            return torch.stack(out, 1).flatten(0, 1)

        return run

    @torch.inference_mode()
    def ours() -> Any:
        return served(images, ids=ids)

    def gate() -> None:
        expected, found = make_networks()(), ours()
        error = float((found - expected).abs().max() / expected.abs().max())
        require(error < 1e-3, f"logits are off by {error:.1e} of the largest from four masked networks'")
        with torch.inference_mode():
            again = bank(images, domains=rows)
        require(float((again - found).abs().max()) <= 1e-3 * float(found.abs().max()), "bank and served bank differ")

    ways = [
        Way("dense network, no masks", lambda: dense),
        Way("a network copy per domain", make_networks),
        Way("ours", lambda: ours),
    ]
    return Case("bank serving", {"network": "resnet18", "domains": 4, "batch": 16, "pixels": pixels}, ways, gate)
