"""Streamed mask training beside plain: the price of drawing each mask again, and of numbers in fewer bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.nn import GumbelSigmoid, mask_model
from dwm_fast.nn.streamed_model import StreamedModel
from dwm_fast.ops import backends
from dwm_fast.optim import MaskAdam, StreamedAdam

from .context import Context
from .measure import Case, Run, Way, require
from .networks import batch, network

_COEFFICIENT = 10.0


def learning(context: Context, name: str, rows: int, pixels: int) -> Case:
    """A step of mask training: forward under fresh masks, backward, regulariser, optimiser; logits of one network."""
    images, labels = batch(name, rows, pixels, context.device)

    def plain() -> Callable[[], Tensor]:
        masked = mask_model(network(name, context.device), GumbelSigmoid(), seed=7).train()
        optimizer = MaskAdam(masked, lr=1e-2, coefficient=_COEFFICIENT)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(masked(images), labels)
            torch.autograd.backward(loss)
            optimizer.step()
            return loss

        return step

    def streamed(logits: str = "fp32", moments: str = "fp32") -> Run:
        model = network(name, context.device)
        masked = mask_model(model, GumbelSigmoid(), seed=7, memory="streamed", logits=logits).train()
        assert isinstance(masked, StreamedModel)
        optimizer = StreamedAdam(masked, lr=1e-2, coefficient=_COEFFICIENT, moments=moments)

        def step() -> Tensor:
            loss = F.cross_entropy(masked(images), labels)
            torch.autograd.backward(loss)
            optimizer.step()
            return loss

        return step

    def gate() -> None:
        exact, found = plain(), streamed()
        for _ in range(2):
            a, b = float(exact().detach()), float(found().detach())
            require(a == b, f"the loss of a streamed step is {b}; of a plain one {a}")

    backend = backends.chosen("sample", context.device.type)
    ways = [
        Way("plain, MaskAdam", plain, backend=backend),
        Way("ours", streamed, backend=backend),
        Way("ours, 8-bit moments", lambda: streamed(moments="8bit"), backend=backend),
        Way("ours, 8-bit moments, fixed16 logits", lambda: streamed("fixed16", "8bit"), backend=backend),
    ]
    parameters = {"network": name, "batch": rows, "dtype": "float32", **({"pixels": pixels} if pixels else {})}
    return Case("step streamed learning", parameters, ways, gate)
