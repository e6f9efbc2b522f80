"""Every case, in order of importance: what is stopped half-way has measured what matters most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from . import (
    bench_bank,
    bench_bits,
    bench_conv2d,
    bench_files,
    bench_linear,
    bench_sample,
    bench_step,
    bench_streamed,
    bench_study,
    bench_update,
)
from .context import Context
from .measure import Case


@dataclass(frozen=True)
class Entry:
    """A case that can be built.

    Attributes:
        name: what --only matches.
        areas: files of tests that have to be green before the case is worth timing (tests/*/test_<area>.py, and those
            whose names go on after it: "sample" has test_sample_tails.py too).
        build: makes the case; called just before it is measured.
        devices: device types on which it is run.
        quick: whether a quick run has it.
        compiled: whether torch.compile makes some of its ways.
        needs: an optional package without which the case is left out, "" for none.
    """

    name: str
    areas: tuple[str, ...]
    build: Callable[[Context], Case]
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = True
    compiled: bool = False
    needs: str = ""


_SAMPLE = ("philox", "sample", "gpu")
_STEP = (*_SAMPLE, "update", "mask_adam", "model", "graphs")
_PRODUCT = ("bits", "linear", "products_gpu")
_CONVOLUTION = ("bits", "conv2d", "products_gpu")


def _streamed(name: str, batch: int, pixels: int) -> Entry:
    build = partial(bench_streamed.learning, name=name, rows=batch, pixels=pixels)
    return Entry(f"step-streamed-{name}", (*_STEP, "streamed", "coded_adam"), build, ("cpu",), quick=False)


def _step(name: str, batch: int, pixels: int, device: str) -> Entry:
    build = partial(bench_step.mask_training, name=name, rows=batch, pixels=pixels)
    return Entry(f"step-masks-{name}", _STEP, build, (device,), compiled=True)


def _tune(name: str, batch: int, pixels: int, device: str) -> Entry:
    build = partial(bench_step.frozen_tuning, name=name, rows=batch, pixels=pixels)
    return Entry(f"step-frozen-{name}", ("update", "frozen", "graphs"), build, (device,))


def _infer(batch: int, pixels: int, device: str, last: bool = False) -> Entry:
    build = partial(bench_step.packed_inference, name="resnet18", rows=batch, pixels=pixels, last=last)
    name = f"step-packed-resnet18{'-channels-last' * last}"
    return Entry(name, ("bits", "packed", "linear", "conv2d"), build, (device,))


def _linear(rows: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> Entry:
    return Entry(f"linear-{rows}", _PRODUCT, partial(bench_linear.packed, rows=rows), devices)


def _drawn(rows: int) -> Entry:
    build = partial(bench_linear.drawn, rows=rows)
    return Entry(f"drawn-linear-{rows}", (*_SAMPLE, *_PRODUCT), build)


def _bank(domains: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> Entry:
    return Entry(f"bank-{domains}", ("bits", "bank"), partial(bench_bank.linear, domains=domains, rows=4), devices)


def _union(domains: int) -> Entry:
    build = partial(bench_bank.union, domains=domains)
    return Entry(f"bank-union-{domains}", ("bits", "bank", "kept", "union"), build, ("cpu",), quick=domains == 2)


def _kept() -> tuple[Entry, ...]:
    """Rows, shares and dtypes in which a product from kept weights may beat a dense one; a quick run has one share."""
    entries = []
    for share in (0.3, 0.2, 0.5):
        for rows in (1, 4, 16):
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                build = partial(bench_linear.kept, rows=rows, share=share, dtype=dtype)
                quick = share == 0.3 and rows in (1, 4)
                devices = ("cpu", "cuda") if dtype == torch.bfloat16 else ("cpu",)
                entries.append(Entry(f"kept-{rows}-{share}-{name}", ("bits", "kept"), build, devices, quick))
    tokens = partial(bench_linear.tokens, share=0.3)
    return (*entries, Entry("kept-tokens", ("bits", "kept"), tokens, ("cpu",)))


ENTRIES = (
    Entry("sample-forward", _SAMPLE, bench_sample.forward, compiled=True),
    Entry("sample-backward", _SAMPLE, bench_sample.backward),
    _step("resnet18", 64, 224, "cuda"),
    _step("resnet18", 32, 64, "cpu"),
    _streamed("resnet18", 32, 64),
    _streamed("mlp4096", 64, 0),
    Entry("update-mask-adam", (*_SAMPLE, "update", "mask_adam"), bench_update.mask_adam),
    Entry("update-frozen-adamw", ("update", "frozen"), bench_update.frozen_adamw),
    _linear(1),
    _linear(4, ("cpu",)),
    _linear(16),
    _linear(64),
    *_kept(),
    _bank(16),
    *(_union(domains) for domains in (2, 3, 4)),
    Entry("bits-pack", ("bits",), bench_bits.pack),
    Entry("bits-unpack", ("bits",), bench_bits.unpack),
    Entry("sample-forward-bits", (*_SAMPLE, "bits"), bench_sample.forward_bits, compiled=True),
    _tune("resnet18", 64, 224, "cuda"),
    _tune("resnet18", 32, 64, "cpu"),
    _infer(64, 224, "cuda"),
    _infer(8, 64, "cpu"),
    _infer(8, 64, "cpu", last=True),
    Entry("bits-apply", ("bits",), bench_bits.apply),
    Entry("bits-count", ("bits",), bench_bits.count),
    Entry("bits-and", ("bits",), bench_bits.set_and),
    Entry("bits-or", ("bits",), bench_bits.set_or, quick=False),
    Entry("bits-xor", ("bits",), bench_bits.set_xor, quick=False),
    Entry("bits-jaccard", ("bits",), bench_bits.jaccard),
    Entry("update-frozen-sgd", ("update", "frozen"), bench_update.frozen_sgd),
    Entry("bank-serving", ("bits", "bank", "mixed"), partial(bench_bank.serving, pixels=64)),
    Entry("bank-coding", ("file",), partial(bench_files.coding, kept=0.2), ("cpu",), needs="constriction"),
    Entry("bank-decoding", ("file",), partial(bench_files.decoding, kept=0.2), ("cpu",), needs="constriction"),
    Entry("bank-switch", ("file", "folder"), partial(bench_files.switching, domains=8), ("cpu",)),
    Entry("conv2d", _CONVOLUTION, partial(bench_conv2d.packed, rows=8, channels=256, pixels=14)),
    _drawn(16),
    _step("vit_b_16", 64, 224, "cuda"),
    _step("resnet50", 64, 224, "cuda"),
    _step("mlp4096", 256, 0, "cuda"),
    _bank(2, ("cuda",)),
    _bank(4, ("cuda",)),
    _bank(8, ("cuda",)),
    Entry("conv2d-wide", _CONVOLUTION, partial(bench_conv2d.packed, rows=64, channels=64, pixels=56), ("cuda",)),
    _linear(256, ("cuda",)),
    _linear(1024, ("cuda",)),
    _linear(4096, ("cuda",)),
    Entry("study", (*_SAMPLE, "update", "frozen", "mask_adam", "bits"), bench_study.pair, quick=False),
)


SHARED = ("backends",)
"""Areas of every case."""


def chosen(context: Context, only: str = "", without: str = "") -> list[Entry]:
    """Entries for a device, in order; `only` and `without` are comma-separated lists of beginnings of names."""
    wanted, unwanted = _names(only), _names(without)
    here = [e for e in ENTRIES if context.device.type in e.devices and (e.quick or not context.quick)]
    return [
        entry
        for entry in here
        if (not wanted or entry.name.startswith(wanted)) and not (unwanted and entry.name.startswith(unwanted))
    ]


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
