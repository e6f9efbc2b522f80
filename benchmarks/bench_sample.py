"""sample: all masks of a network drawn and applied in one call, and the gradient of its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import dwm_fast
from dwm_fast import ops
from dwm_fast.ops import backends
from dwm_fast.ops.philox import signed_uniform
from dwm_fast.ops.sample import noisy

from .context import Context
from .machine import copy_way
from .measure import Case, Run, Way, require
from .networks import Tensors, mask_tensors
from .rivals import gumbel_mask

_MISMATCHES = 2.0**-17
"""Largest fraction of bits in which backends may differ: u within 2^-20 of a threshold, with room for chance."""


def forward_bytes(count: int, weight_bytes: int, pack: bool) -> int:
    """Read logits (fp32) and weights, write masked weights and, packed, one bit each."""
    return count * (4 + 2 * weight_bytes) + (count // 8 if pack else 0)


def backward_bytes(count: int, weight_bytes: int) -> int:
    """Read gradients and weights in the weights' dtype and logits (fp32), write the logits' gradients (fp32)."""
    return count * (4 + 2 * weight_bytes + 4)


def checked_layers(t: Tensors, device: torch.device) -> list[int]:
    """Layers that a gate compares: all on a GPU, on a CPU those below 150,000 weights (the reference is slow)."""
    return [i for i, w in enumerate(t.weights) if device.type == "cuda" or w.numel() < 150_000]


def _check_forward(t: Tensors, device: torch.device) -> None:
    masked, bits, _ = ops.sample(t.logits, t.weights, t.rng_state, t.tau, pack=True)
    masks = ops.unpack(bits, [w.numel() for w in t.weights])
    chosen = checked_layers(t, device)
    with dwm_fast.use_backend("reference"):
        expected, _, _ = ops.sample(
            [t.logits[i] for i in chosen], [t.weights[i] for i in chosen], t.rng_state, t.tau, layers=chosen
        )
    differ = sum(int((masked[i] != e).sum()) for i, e in zip(chosen, expected, strict=True))
    total = sum(t.weights[i].numel() for i in chosen)
    require(differ <= 2 + _MISMATCHES * total, f"{differ} of {total} masked weights differ from the reference's")
    for weight, out, mask in zip(t.weights, masked, masks, strict=True):
        exact = torch.where(mask.view(weight.shape), weight, torch.zeros_like(weight))
        require(torch.equal(exact, out), "packed bits and masked weights disagree")
    kept, expectation = sum(int(m.sum()) for m in masks), sum(float(torch.sigmoid(x).sum()) for x in t.logits)
    require(abs(kept - expectation) < 5 * t.count**0.5, f"{kept} weights kept; sigmoid gives {expectation:.0f}")


def _forward(context: Context, pack: bool) -> Case:
    t = mask_tensors("resnet18", context.device)
    moved = forward_bytes(t.count, 4, pack)
    learned = [x.clone().requires_grad_() for x in t.logits]

    def eager() -> list[Tensor]:
        return [w * gumbel_mask(x) for w, x in zip(t.weights, learned, strict=True)]

    def ours() -> Any:
        return ops.sample(learned, t.weights, t.rng_state, t.tau, pack=pack)

    ways = [
        Way("eager", lambda: eager, moved, graph=False),
        *context.compiled(eager, moved),
        copy_way(moved, context.device),
        Way("ours", lambda: ours, moved, graph=True, backend=backends.chosen("sample", context.device.type)),
    ]
    return Case(
        "sample forward and bits" if pack else "sample forward",
        {"network": "resnet18", "weights": t.count, "dtype": "float32"},
        ways,
        lambda: _check_forward(t, context.device),
    )


def forward(context: Context) -> Case:
    """Masked weights of ResNet-18."""
    return _forward(context, pack=False)


def forward_bits(context: Context) -> Case:
    """Masked weights of ResNet-18 and their packed bits."""
    return _forward(context, pack=True)


def logit_gradients(t: Tensors, grads: list[Tensor], logits: Sequence[Tensor], penalty: Tensor) -> list[Tensor]:
    """Gradients of masked weights, and of the regulariser, as gradients of `logits`, by one call of the operation."""
    layers, thresholds = list(range(len(grads))), [0.0] * len(grads)
    shared = (t.weights, t.rng_state, t.tau, layers, thresholds, 0, 0)
    found: list[Tensor] = torch.ops.dwm_fast.sample_backward(grads, penalty, logits, *shared, True, False)[0]
    return found


def backward(context: Context) -> Case:
    """Gradient of every masked weight -> gradient of every logit."""
    t = mask_tensors("resnet18", context.device)
    learned = [x.clone().requires_grad_() for x in t.logits]
    grads = [torch.randn_like(w) for w in t.weights]
    moved = backward_bytes(t.count, 4)

    def from_graph(outputs: list[Tensor]) -> Run:
        return lambda: torch.autograd.grad(outputs, learned, grads, retain_graph=True)

    def make_eager() -> Run:
        return from_graph([w * gumbel_mask(x) for w, x in zip(t.weights, learned, strict=True)])

    def ours() -> Any:
        return logit_gradients(t, grads, t.logits, torch.zeros((), device=context.device))

    def gate() -> None:
        found = ours()
        chosen = checked_layers(t, context.device)
        masked = ops.sample(learned, t.weights, t.rng_state, t.tau)[0]
        through = torch.autograd.grad(masked, learned, grads)
        for i in chosen:
            u = signed_uniform(ops.random_words(t.logits[i].numel(), t.rng_state, i)).view(t.logits[i].shape)
            soft = torch.sigmoid(noisy(t.logits[i].double(), u.double()))
            exact = grads[i].double() * t.weights[i].double() * soft * (1 - soft)
            error = float((found[i].double() - exact).abs().max() / exact.abs().max())
            require(error < 1e-5, f"layer {i}: gradient is off by {error:.1e} of its largest entry")
            require(torch.equal(found[i], through[i]), f"layer {i}: autograd gives another gradient")

    backend = backends.chosen("sample_backward", context.device.type)
    return Case(
        "sample backward",
        {"network": "resnet18", "weights": t.count, "dtype": "float32"},
        [
            Way("eager", make_eager, moved, graph=False),
            copy_way(moved, context.device),
            Way("ours", lambda: ours, moved, graph=True, backend=backend),
        ],
        gate,
    )
