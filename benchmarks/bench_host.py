"""Host time of a mask-training step, and how many launches it makes: python -m benchmarks.bench_host

A step that is not captured is bound by the host where layers are small. This runs all of a ResNet-18 mask step's Python
and dispatch, for the Triton backend, without its kernels and without the network's own layers: kernels are replaced by
counters, and each layer only reads its masked weight. It needs no GPU: CPU tensors take the way of CUDA tensors but for
the driver's calls (streams, device guards), and times are CPU time of the thread, which other load disturbs least.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: CPU tensors take the Triton backend

import torch
from torch import Tensor, nn

import dwm_fast
from dwm_fast.kernels import _pointers, _tables, sample, update
from dwm_fast.nn.layers import MaskedLayer
from dwm_fast.ops import registration
from dwm_fast.optim import MaskAdam

from .networks import network

_KERNELS = {
    sample: ("sample_fwd_kernel", "penalty_fwd_kernel", "sample_bwd_kernel"),
    update: ("mask_adam_kernel", "frozen_kernel"),
    _pointers: ("write_pointers_kernel",),
}
_BIG = 2**16
"""Elements from which a buffer of the CPU is a new mapping of memory at every step."""
_NOT_LAUNCHED = tuple(
    f"aten::{name}"
    for name in ("as_strided", "detach", "empty", "lift", "new_empty", "select", "slice", "squeeze", "to", "view")
)
"""Starts of names of operations that move no element."""

_NOT_OURS = ("aten::new_zeros", "aten::ones_like", "aten::to")
"""Loss and its first gradient, which the stand-in for the network makes; what torch's dispatcher does to an argument
while a profiler listens, which is passed by otherwise."""


class Launches:
    """Stands in for the kernels and counts them."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        for module, names in _KERNELS.items():
            for name in names:
                setattr(module, name, _Stub(name, self.count))
        # On a GPU, lists are checked only where a new table of addresses is made: never, here.
        together = registration._together
        for module, name, stand_in in (
            (_tables, "empty", _Memory()),
            (registration, "_together", lambda args, device, lists: together(args, device, lists=False)),
        ):
            setattr(module, name, stand_in)


class _Memory:
    """In the place of torch.empty: a big buffer is used again, as the caching allocator of a GPU does it."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not isinstance(size, int) or size < _BIG:
            return torch.empty(size, dtype=dtype, device=device)
        if (size, dtype) not in self.kept:
            self.kept[size, dtype] = torch.empty(size, dtype=dtype, device=device)
        return self.kept[size, dtype].detach()


class _Stub:
    def __init__(self, name: str, count: Counter[str]) -> None:
        self.name, self.counter = name, count

    def __getitem__(self, grid: Any) -> _Stub:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.counter[self.name] += 1


class _Reader(nn.Module):
    """Reads the masked weight of every layer, as the layers' own forward does, and computes nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = [m for m in model.modules() if isinstance(m, MaskedLayer)]

    def forward(self, grads: list[Tensor]) -> Tensor:
        loss: Tensor = _Network.apply(grads, *[layer.masked_weight() for layer in self.layers])
        return loss


class _Network(torch.autograd.Function):
    """In the place of the network and its loss: hands back the same gradients at every step."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.grads = grads
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.grads)


class Step:
    """A mask-training step of ResNet-18, in four parts: zero_grad, draw, backward, step."""

    def __init__(self) -> None:
        model = network("resnet18", torch.device("cpu")).to(memory_format=torch.channels_last)
        self.masked = dwm_fast.mask_model(model, dwm_fast.GumbelSigmoid(), seed=7).train()
        self.masked.model = _Reader(self.masked.model)
        rate = torch.tensor(1e-2, dtype=torch.float64)  # as it is kept on a GPU
        self.optimizer = MaskAdam(self.masked, lr=rate, coefficient=10.0)
        self.grads = [torch.zeros_like(layer.frozen_weight) for layer in self.masked.mask_layers().values()]
        self.loss = torch.zeros(())

    def draw(self) -> None:
        self.loss = self.masked(self.grads)

    def backward(self) -> None:
        torch.autograd.backward(self.loss)

    def parts(self) -> dict[str, Callable[[], Any]]:
        return {
            "zero_grad": self.optimizer.zero_grad,
            "draw": self.draw,
            "backward": self.backward,
            "step": self.optimizer.step,
        }


def measure(step: Step, repeats: int) -> dict[str, tuple[float, float]]:
    """Median and least microseconds of each part and of the whole step."""
    times: dict[str, list[float]] = {name: [] for name in (*step.parts(), "whole")}
    for _ in range(repeats):
        began = last = time.thread_time()
        for name, part in step.parts().items():
            part()
            now = time.thread_time()
            times[name].append(now - last)
            last = now
        times["whole"].append(last - began)
    return {name: (1e6 * statistics.median(values), 1e6 * min(values)) for name, values in times.items()}


def _launches(event: Any) -> bool:
    return event.name.startswith("aten::") and not event.name.startswith(_NOT_LAUNCHED)


def _is_other(event: Any) -> bool:
    return event is not None and (event.name in _NOT_OURS or _is_other(event.cpu_parent))


def launches(step: Step, counter: Counter[str]) -> dict[str, int]:
    """Kernels of this library and operations of torch that one step launches beside the network's own."""
    counter.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for part in step.parts().values():
            part()
    found = dict(counter)
    for event in profile.events():
        if _launches(event) and not any(_launches(child) for child in event.cpu_children) and not _is_other(event):
            found[event.name] = found.get(event.name, 0) + 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500, help="steps that the medians are over")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    counter = Launches().count
    with dwm_fast.use_backend("triton"):
        step = Step()
        measure(step, 20)
        gc.disable()
        found = measure(step, repeats)
        made = launches(step, counter)
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(", ".join(f"{name} {median:.0f} us (least {least:.0f})" for name, (median, least) in found.items()))
    print(f"{sum(made.values())} launches a step: " + ", ".join(f"{n} {name}" for name, n in made.items()))


if __name__ == "__main__":
    main()
