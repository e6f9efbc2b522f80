"""bank files: coding and decoding the masks of one domain, and switching between domains of a folder."""

from __future__ import annotations

import importlib
import itertools
import lzma
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwm_fast.bank import CODINGS, DomainMasks, MaskBank, MaskFile, encode_domain, make_domain

from .context import Context
from .measure import Case, Way, require
from .networks import network
from .rivals import packed


def _masks(kept: float) -> dict[str, Tensor]:
    """Masks of ResNet-18's convolutions; the density varies from one output channel to the next, as in learned ones."""
    generator = torch.Generator().manual_seed(5)
    masks = {}
    for name, layer in network("resnet18", torch.device("cpu")).named_modules():
        if isinstance(layer, nn.Conv2d):
            shape = layer.weight.shape
            density = kept * (0.5 + torch.rand(shape[0], 1, 1, 1, generator=generator))
            masks[f"{name}.weight"] = torch.rand(shape, generator=generator) < density
    return masks


def _packed_bytes(record: DomainMasks) -> bytes:
    return torch.cat([packed(mask) for mask in record.masks().values()]).numpy().tobytes()


def _zstd(level: int) -> Any:
    """A zstd compressor; ImportError where the package is missing."""
    return importlib.import_module("zstandard").ZstdCompressor(level=level)


def _parameters(record: DomainMasks, kept: float) -> dict[str, Any]:
    return {"network": "resnet18 convolutions", "weights": sum(record.info.layout.numels), "kept": kept}


def coding(context: Context, kept: float) -> Case:
    """Masks -> the bytes of a file, beside compressors on packed bits."""
    record = make_domain("sketch", _masks(kept))
    raw = _packed_bytes(record)

    def compressor(make: Callable[[], Callable[[bytes], bytes]]) -> Callable[[], Any]:
        def made() -> Any:
            compress = make()
            return lambda: compress(raw)

        return made

    def coded() -> bytes:
        return encode_domain(record, "coded")

    def gate() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sketch.safetensors"
            path.write_bytes(coded())
            require(torch.equal(MaskFile(path).load().bits, record.bits), "coded masks do not come back")

    ways = [
        Way("zlib, level 6", compressor(lambda: lambda data: zlib.compress(data, 6)), stored=True),
        Way("xz, preset 6", compressor(lambda: lambda data: lzma.compress(data, preset=6)), stored=True),
        Way("zstd, level 19", compressor(lambda: _zstd(19).compress), stored=True),
        Way("ours, raw", lambda: lambda: encode_domain(record, "raw"), stored=True),
        Way("ours", lambda: coded, stored=True, backend="constriction"),
    ]
    return Case("bank coding", _parameters(record, kept), ways, gate)


def decoding(context: Context, kept: float) -> Case:
    """The bytes of a file -> packed bits, checked; the folder is kept as long as the case."""
    record = make_domain("sketch", _masks(kept))
    folder = tempfile.TemporaryDirectory()

    def path(coding: str) -> Path:
        return Path(folder.name) / f"{coding}.safetensors"

    for name in CODINGS:
        path(name).write_bytes(encode_domain(record, name))
    compressed = lzma.compress(_packed_bytes(record), preset=6)

    def read(name: str) -> Any:
        return lambda: MaskFile(path(name)).load().bits

    def gate() -> None:
        for name in CODINGS:
            require(torch.equal(read(name)(), record.bits), f"{name} masks do not come back")

    ways = [
        Way("xz, preset 6", lambda: lambda: lzma.decompress(compressed)),
        Way("ours, raw", lambda: read("raw")),
        Way("ours", lambda: read("coded"), backend="constriction"),
    ]
    return Case("bank decoding", _parameters(record, kept), ways, gate)


def switching(context: Context, domains: int) -> Case:
    """From one domain of a folder to the next: masked weights, none kept, from files that are in the page cache."""
    model = network("resnet18", torch.device("cpu"))
    folder = tempfile.TemporaryDirectory()
    base = _masks(0.3)
    names = [f"domain{i}" for i in range(domains)]
    bank = MaskBank(model)
    masks = {name: {n: m.roll(i, 0) for n, m in base.items()} for i, name in enumerate(names)}
    for name in names:
        bank.add(name, masks[name])
    bank.save(folder.name)
    weights = {n: p.detach() for n, p in model.named_parameters() if n in base}
    x = torch.randn(1, 3, 32, 32)

    def by_hand() -> Any:
        turn = itertools.cycle(names)

        def run() -> list[Tensor]:
            mask = masks[next(turn)]
            return [weight * mask[n] for n, weight in weights.items()]

        return run

    def loaded() -> MaskBank:
        return MaskBank.load(folder.name, model, memory_budget=0)

    def ours() -> Any:
        turn, served = itertools.cycle(names), loaded()
        return lambda: served.activate(next(turn))

    def gate() -> None:
        served, seen = loaded(), []
        for name in names[:2]:
            served.activate(name)
            bank.activate(name)
            seen.append(bank(x))
            require(torch.equal(served(x), seen[-1]), "a domain from a file answers otherwise than from memory")
        require(not torch.equal(*seen), "two domains give the same answer")

    parameters = {"network": "resnet18", "domains": domains}
    ways = [Way("eager: bool masks in memory times weights", by_hand), Way("ours", ours)]
    return Case("bank switch", parameters, ways, gate)
