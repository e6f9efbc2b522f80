"""End-to-end steps beside the dense ones: mask training, frozen fine-tuning, and inference from bits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dwm_fast
from dwm_fast.graphs import capture_step
from dwm_fast.nn import GumbelSigmoid, mask_model, maskable_weights
from dwm_fast.ops import backends
from dwm_fast.optim import FrozenAdamW, MaskAdam

from .context import Context
from .measure import Case, Run, Way, require
from .networks import batch, network
from .rivals import EagerPackedConv2d, EagerPackedLinear, eager_masked, eager_penalty

_COEFFICIENT = 10.0
_KEEP = 0.5

Step = Callable[[Tensor, Tensor], Tensor]


class _Setting:
    """A network, a batch, and how steps on them are run."""

    def __init__(self, context: Context, name: str, rows: int, pixels: int) -> None:
        self.context, self.name = context, name
        self.model = network(name, context.device)
        self.images, self.labels = batch(name, rows, pixels, context.device)
        self.parameters = {
            "network": name,
            "batch": rows,
            **({} if name == "mlp4096" else {"pixels": pixels}),
            "dtype": "bfloat16 autocast" if context.on_gpu else "float32",
        }

    def autocast(self) -> Any:
        if self.context.on_gpu:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast():
            out = model(x)
        return F.cross_entropy(out.float(), y)

    def trainable_copy(self) -> tuple[nn.Module, list[nn.Parameter]]:
        """A copy whose maskable weights, and nothing else, are trainable."""
        model = network(self.name, self.context.device)
        for p in model.parameters():
            p.requires_grad_(False)
        weights = [there.weight for there in maskable_weights(model).values()]
        for weight in weights:
            weight.requires_grad_()
        return model, weights

    def adam_options(self) -> dict[str, Any]:
        return {"fused": True, **({"capturable": True} if self.context.on_gpu else {})}

    def eager(self, step: Step) -> Run:
        return lambda: step(self.images, self.labels)

    def captured(self, step: Step) -> Run:
        """The step as one CUDA graph on a GPU; on a CPU as it is."""
        graph = capture_step(step, self.images, self.labels)
        return lambda: graph(self.images, self.labels)

    # Each of these makes a step with a model and an optimiser of its own.

    def dense(self) -> Step:
        model, weights = self.trainable_copy()
        optimizer = torch.optim.AdamW(weights, lr=1e-4, **self.adam_options())

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(model, x, y)
            torch.autograd.backward(loss)
            optimizer.step()
            return loss

        return step

    def eager_masks(self, compiled: bool = False) -> Step:
        model, logits = eager_masked(self.model)
        optimizer = torch.optim.Adam(logits, lr=1e-2, eps=1e-15, **self.adam_options())

        def objective(x: Tensor, y: Tensor) -> Tensor:
            return self.loss(model, x, y) + _COEFFICIENT * eager_penalty(logits)

        if compiled:
            torch._dynamo.reset()
            objective = torch.compile(objective)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = objective(x, y)
            torch.autograd.backward(loss)
            optimizer.step()
            return loss

        return step

    def ours(self, recipe: str = "MaskAdam") -> Step:
        return _OurStep(self, recipe)


class _OurStep:
    """Mask training with this library; `recipe` "MaskAdam", or "Adam" for torch's."""

    def __init__(self, setting: _Setting, recipe: str) -> None:
        self.setting = setting
        self.masked = mask_model(setting.model, GumbelSigmoid(), seed=7).train()
        self.folded = recipe == "MaskAdam"
        self.optimizer: torch.optim.Optimizer
        if self.folded:
            self.optimizer = MaskAdam(self.masked, lr=1e-2, coefficient=_COEFFICIENT)
        else:
            logits = list(self.masked.mask_parameters())
            self.optimizer = torch.optim.Adam(logits, lr=1e-2, eps=1e-15, **setting.adam_options())

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.setting.loss(self.masked, x, y)
        if not self.folded:
            loss = loss + _COEFFICIENT * self.masked.sparsity_penalty()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss


def _check_mask_step(setting: _Setting) -> None:
    """One step by the default backend and one by the reference, same noise: same loss, same direction."""
    found = _OurStep(setting, "MaskAdam")
    loss = float(found(setting.images, setting.labels).detach())
    with dwm_fast.use_backend("reference"):
        expected = _OurStep(setting, "Adam")
        total = expected(setting.images, setting.labels).detach()
    cross = float(total) - _COEFFICIENT * float(torch.sigmoid(torch.tensor(2.0)))
    tolerance = 3e-2 if setting.context.on_gpu else 1e-3
    require(abs(loss - cross) <= tolerance * (1 + abs(cross)), f"loss is {loss}; expected {cross}")
    moves = [torch.cat([x.detach().reshape(-1) - 2 for x in s.masked.mask_parameters()]) for s in (found, expected)]
    cosine = float(F.cosine_similarity(moves[0].double(), moves[1].double(), dim=0))
    require(cosine > 0.98, f"the step's direction has cosine {cosine:.4f} to the reference's")


def mask_training(context: Context, name: str, rows: int, pixels: int) -> Case:
    """A mask-training step: forward under fresh masks, backward, regulariser, optimiser."""
    setting = _Setting(context, name, rows, pixels)
    backend = backends.chosen("sample", context.device.type)
    ways = [Way("dense step", lambda: setting.captured(setting.dense()))]
    if context.on_gpu:
        ways.append(Way("dense step, not captured", lambda: setting.eager(setting.dense())))
    ways.append(Way("eager masks", lambda: setting.eager(setting.eager_masks())))
    if context.on_gpu:
        ways.append(Way("eager masks, captured", lambda: setting.captured(setting.eager_masks())))
    if not context.quick:
        ways.append(Way("torch.compile", lambda: setting.eager(setting.eager_masks(compiled=True))))
        if context.on_gpu:
            ways.append(Way("torch.compile, captured", lambda: setting.captured(setting.eager_masks(compiled=True))))
    ways.append(Way("ours", lambda: setting.captured(setting.ours()), backend=backend))
    ways.append(Way("ours, with torch's Adam", lambda: setting.captured(setting.ours("Adam")), backend=backend))
    if context.on_gpu:
        ways.append(Way("ours, not captured", lambda: setting.eager(setting.ours()), backend=backend))
    return Case("step mask training", setting.parameters, ways, lambda: _check_mask_step(setting))


class _FrozenStep:
    """Fine-tuning with half of the weights frozen: by FrozenAdamW, or by hand around torch's AdamW."""

    def __init__(self, setting: _Setting, by_hand: bool, compact: bool = False) -> None:
        self.setting, self.by_hand = setting, by_hand
        self.model, self.weights = setting.trainable_copy()
        generator = torch.Generator(device=setting.context.device).manual_seed(3)
        device = setting.context.device
        self.keeps = [torch.rand(w.shape, device=device, generator=generator) < _KEEP for w in self.weights]
        self.before = [w.detach().clone() for w in self.weights]
        self.optimizer: torch.optim.Optimizer
        if by_hand:
            self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, **setting.adam_options())
        else:
            self.optimizer = FrozenAdamW(self.weights, lr=1e-4, keep=self.keeps, compact=compact)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.setting.loss(self.model, x, y)
        torch.autograd.backward(loss)
        self.optimizer.step()
        if self.by_hand:
            with torch.no_grad():
                for weight, keep, start in zip(self.weights, self.keeps, self.before, strict=True):
                    weight.copy_(torch.where(keep, start, weight))
        return loss


def _check_frozen_step(setting: _Setting) -> None:
    found, expected = _FrozenStep(setting, by_hand=False), _FrozenStep(setting, by_hand=True)
    losses = [float(s(setting.images, setting.labels).detach()) for s in (found, expected)]
    require(abs(losses[0] - losses[1]) <= 1e-3 * (1 + abs(losses[1])), f"losses differ: {losses}")
    for a, b, keep, start in zip(found.weights, expected.weights, found.keeps, found.before, strict=True):
        require(torch.equal(a[keep], start[keep]), "a kept weight has changed")
        require(float((a - b).detach().abs().max()) < 3e-4, "a free weight is more than a step away from torch's")


def frozen_tuning(context: Context, name: str, rows: int, pixels: int) -> Case:
    """A fine-tuning step that leaves half of the weights as they are."""
    setting = _Setting(context, name, rows, pixels)
    backend = backends.chosen("frozen_adamw", context.device.type)
    ways = [
        Way("dense step, nothing frozen", lambda: setting.captured(setting.dense())),
        Way("torch's AdamW, kept weights put back", lambda: setting.captured(_FrozenStep(setting, by_hand=True))),
        Way("ours", lambda: setting.captured(_FrozenStep(setting, by_hand=False)), backend=backend),
    ]
    if context.on_gpu:
        compact = Way(
            "ours, compact state", lambda: setting.captured(_FrozenStep(setting, False, compact=True)), backend=backend
        )
        ways.append(compact)
    parameters = {**setting.parameters, "kept": _KEEP}
    return Case("step frozen fine-tuning", parameters, ways, lambda: _check_frozen_step(setting))


def _eager_bits(model: nn.Module, packed: nn.Module) -> nn.Module:
    """The network with layers that unpack their bits in every forward, in plain PyTorch."""
    model = copy.deepcopy(model)
    for name, there in maskable_weights(model).items():
        layer = there.module
        layer.register_buffer("bits", packed.get_buffer(f"{name}.bits"))
        layer.__class__ = EagerPackedConv2d if isinstance(layer, nn.Conv2d) else EagerPackedLinear
    return model


def packed_inference(context: Context, name: str, rows: int, pixels: int, last: bool = False) -> Case:
    """A forward pass of a network that holds one copy of the weights and a domain's bits.

    last: images on a CPU, and the weights of the dense network there, are channels_last, as all are on a GPU.
    """
    setting = _Setting(context, name, rows, pixels)
    masked = mask_model(setting.model, GumbelSigmoid(), seed=7)
    with torch.no_grad():
        for logits in masked.mask_parameters():
            logits.normal_(0.0, 2.0)
    merged, packed = dwm_fast.merge(masked).eval(), dwm_fast.pack(masked)
    if last:
        setting.images = setting.images.contiguous(memory_format=torch.channels_last)
        setting.parameters["layout"] = "channels_last"
        merged = merged.to(memory_format=torch.channels_last)
    eager = _eager_bits(setting.model, packed).eval()

    def forward(model: nn.Module) -> Run:
        def run() -> Tensor:
            with torch.inference_mode(), setting.autocast():
                out: Tensor = model(setting.images)
            return out

        return run

    def gate() -> None:
        expected = forward(merged)().double()
        eps = torch.finfo(torch.bfloat16 if context.on_gpu else torch.float32).eps
        for model in (packed, eager):
            error = float((forward(model)().double() - expected).abs().max() / expected.abs().max())
            # About twenty layers, each of which rounds its sums and its output in another order: three eps a layer.
            require(error <= 64 * eps, f"the network's output is off by {error:.1e} of its largest entry")

    backend = backends.chosen("linear_packed", context.device.type)
    ways = [
        Way("dense, a masked copy of its own", lambda: forward(merged), graph=True),
        Way("eager: unpack, multiply, forward", lambda: forward(eager), graph=True),
        Way("ours", lambda: forward(packed), graph=True, backend=backend),
    ]
    return Case("step packed inference", setting.parameters, ways, gate)
