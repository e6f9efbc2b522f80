"""update: optimiser steps on as many weights as ResNet-18 has, beside torch's fused ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dwm_fast
from dwm_fast import ops
from dwm_fast.ops import backends
from dwm_fast.optim import FrozenAdamW, FrozenSGD

from .bench_sample import checked_layers, logit_gradients
from .context import Context
from .machine import copy_way
from .measure import Case, Run, Way, require
from .networks import Tensors, mask_tensors

_KEEP = 0.5
_BETAS = (0.9, 0.999)

ADAMW_BYTES = 28
"""Per fp32 weight: weight and both moments read and written, gradient read."""
SGD_BYTES = 20
"""Per fp32 weight: weight and momentum read and written, gradient read."""
MASK_ADAM_BYTES = 32
"""Per fp32 weight: logit and both moments read and written, gradient and weight read."""


def _parameters(weights: list[Tensor], grads: list[Tensor]) -> list[nn.Parameter]:
    made = [nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(made, grads, strict=True):
        p.grad = g
    return made


def _step_of(optimizer: torch.optim.Optimizer) -> Run:
    return optimizer.step


def _frozen_case(
    context: Context, name: str, op: str, ours_class: Any, torch_class: Any, options: dict[str, Any], per: int
) -> Case:
    t = mask_tensors("resnet18", context.device)
    grads = [torch.randn_like(w) for w in t.weights]
    generator = torch.Generator(device=context.device).manual_seed(3)
    keeps = [torch.rand(w.shape, device=w.device, generator=generator) < _KEEP for w in t.weights]
    moved = per * t.count

    def make_torch() -> Run:
        extra = {"capturable": True} if context.on_gpu and name == "AdamW" else {}
        return _step_of(torch_class(_parameters(t.weights, grads), fused=True, **options, **extra))

    def make_ours(compact: bool) -> Run:
        return _step_of(ours_class(_parameters(t.weights, grads), keep=keeps, compact=compact, **options))

    def gate() -> None:
        free, frozen = _parameters(t.weights, grads), _parameters(t.weights, grads)
        expected = torch_class(free, foreach=False, **options)
        found = ours_class(frozen, keep=keeps, **options)
        for _ in range(3):
            expected.step()
            found.step()
        for before, keep, a, b in zip(t.weights, keeps, free, frozen, strict=True):
            require(torch.equal(b[keep], before[keep]), "a kept weight has changed")
            error = float((a - b).detach()[~keep].abs().max())
            require(error <= 1e-6, f"a free weight is {error:.1e} away from torch.optim's")

    backend = backends.chosen(op, context.device.type)
    ways = [
        Way(f"torch's fused {name}, nothing frozen", make_torch, moved, graph=True),
        copy_way(moved, context.device),
        Way("ours", lambda: make_ours(False), moved + t.count // 8, graph=True, backend=backend),
        Way("ours, compact state", lambda: make_ours(True), graph=True, backend=backend),
    ]
    return Case(f"update Frozen{name}", {"weights": t.count, "kept": _KEEP, "dtype": "float32"}, ways, gate)


def frozen_adamw(context: Context) -> Case:
    """FrozenAdamW with half of the weights kept."""
    options = {"lr": 1e-3, "weight_decay": 1e-2}
    return _frozen_case(context, "AdamW", "frozen_adamw", FrozenAdamW, torch.optim.AdamW, options, ADAMW_BYTES)


def frozen_sgd(context: Context) -> Case:
    """FrozenSGD with momentum and half of the weights kept."""
    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
    return _frozen_case(context, "SGD", "frozen_sgd", FrozenSGD, torch.optim.SGD, options, SGD_BYTES)


class _MaskStep:
    """The state of one fused mask step, straight at the operation."""

    def __init__(self, t: Tensors, grads: list[Tensor], only: list[int] | None = None) -> None:
        self.layers = only if only is not None else list(range(len(grads)))
        self.t, self.grads = t, [grads[i] for i in self.layers]
        self.logits = [t.logits[i].clone() for i in self.layers]
        self.weights = [t.weights[i] for i in self.layers]
        self.first, self.second = ([torch.zeros_like(x) for x in self.logits] for _ in range(2))
        device = t.rng_state.device
        self.scale = torch.tensor(10.0 / t.count, device=device)
        self.steps = torch.ones(len(self.layers), device=device)
        self.lr = torch.tensor(1e-2, dtype=torch.float64, device=device)

    def __call__(self) -> None:
        ops.mask_adam(
            self.logits,
            self.weights,
            self.grads,
            self.first,
            self.second,
            self.t.rng_state,
            self.t.tau,
            self.scale,
            self.steps,
            self.lr,
            mode=0,
            layers=self.layers,
            thresholds=[0.0] * len(self.layers),
            betas=_BETAS,
        )


def mask_adam(context: Context) -> Case:
    """MaskAdam: chain rule, regulariser and Adam in one pass; torch's fused Adam does the last of the three."""
    t = mask_tensors("resnet18", context.device)
    grads = [torch.randn_like(w) for w in t.weights]
    moved = MASK_ADAM_BYTES * t.count
    options: dict[str, Any] = {"lr": 1e-2, "fused": True, **({"capturable": True} if context.on_gpu else {})}

    def make_torch() -> Run:
        return _step_of(torch.optim.Adam(_parameters(t.logits, grads), **options))

    def make_staged() -> Run:
        learned = _parameters(t.logits, grads)
        step = torch.optim.Adam(learned, **options).step
        penalty = torch.tensor(10.0, device=context.device)

        def run() -> None:
            for p, g in zip(learned, logit_gradients(t, grads, learned, penalty), strict=True):
                p.grad = g
            step()

        with torch.no_grad():
            run()
        return torch.no_grad()(run)

    def gate() -> None:
        found, chosen = _MaskStep(t, grads), checked_layers(t, context.device)
        found()
        expected = _MaskStep(t, grads, chosen)
        with dwm_fast.use_backend("reference"):
            expected()
        for i, e, first in zip(chosen, expected.logits, expected.first, strict=True):
            sure = first.abs() > 1e-4 * first.abs().max()
            error = float((found.logits[i] - e)[sure].abs().max())
            require(error < 1e-4, f"layer {i}: a logit is {error:.1e} away from the reference's after a step of 1e-2")

    backend = backends.chosen("mask_adam", context.device.type)
    ways = [
        Way("torch's fused Adam alone", make_torch, ADAMW_BYTES * t.count, graph=True),
        copy_way(moved, context.device),
        Way("ours", lambda: _MaskStep(t, grads), moved, graph=True, backend=backend),
        Way("ours, staged with torch's Adam", make_staged, graph=True, backend=backend),
    ]
    return Case("update MaskAdam", {"weights": t.count, "dtype": "float32"}, ways, gate)
