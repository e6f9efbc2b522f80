"""Mutants of mask files whose checksums and seal are right again, so that only what lies behind those can refuse them.

`python -m tests.bank.fuzz COUNT [SEED]` runs a campaign and prints what became of the files.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dwm_fast.bank import MaskFile, encode_domain, make_domain
from dwm_fast.errors import MaskFileError

from . import reader

WORDS: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 8, 63, 64, 2**24, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, 10**30, 10**400, 1.5,
    "", "x", "raw", "ans", "channel", "binary", "ternary", "\ud800", "a\0b", "x" * 5000, [], {}, [None], [-1], [2**40],
    [2**40, 0], [0, 2**60], [2**52, 2**52], [1] * 17, {"a": 1}, "bits.w", "state.", "values.w", "0" * 64, "0" * 32,
]  # fmt: skip

MOST_READ = 200_000
"""Weights that the reader in plain Python goes through; a mask of more has to have the ones that its header says."""


@dataclass
class Parts:
    """A mask file taken apart: tensors by name (dtype code, shape, bytes) but for checksums, and the description."""

    tensors: dict[str, tuple[str, list[int], bytes]]
    content: dict[str, Any]


def take_apart(data: bytes) -> Parts:
    """The parts of a good file."""
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    content, body = json.loads(table.pop("__metadata__")["content"]), data[8 + length :]
    tensors = {n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for n, e in table.items() if n != "sha256"}
    return Parts(tensors, content)


def put_together(parts: Parts, spoil_table: random.Random | None = None) -> bytes:
    """A file of these parts with right offsets, checksums, padding and seal; its table spoilt on demand."""
    tensors = dict(parts.tensors)
    sums = b"".join(hashlib.sha256(body).digest() for _, _, body in tensors.values())
    content = {**parts.content, "checksums": hashlib.sha256(sums).hexdigest()}
    tensors["sha256"] = ("U8", [len(tensors), 32], sums)
    table: dict[str, Any] = {}
    position = 0
    for name, (code, shape, body) in tensors.items():
        table[name] = {"dtype": code, "shape": shape, "data_offsets": [position, position + len(body)]}
        position += len(body)
    if spoil_table is not None:
        spoil(table, spoil_table)
    metadata = {"content": json.dumps(content), "format": "dwm-fast-mask", "seal": "0" * 64, "version": "1"}
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    raw = len(text).to_bytes(8, "little") + text
    seal = hashlib.sha256(raw).hexdigest()
    data = raw.replace(b'"seal":"' + b"0" * 64, b'"seal":"' + seal.encode(), 1)
    return data + b"".join(body for _, _, body in tensors.values())


def spoil(tree: Any, rng: random.Random) -> None:
    """Put one strange value somewhere into nested lists and objects, or drop or repeat something."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.8:
            tree = tree[key]
            continue
        action = rng.random()
        if action < 0.6:
            tree[key] = copy.deepcopy(rng.choice(WORDS))
        elif action < 0.75 and type(tree[key]) is int:
            tree[key] += rng.choice([-1, 1, 8, -8, 1 << rng.randrange(40)])
        elif action < 0.9:
            del tree[key]
        elif isinstance(tree, dict):
            tree[str(rng.choice(WORDS))[:600]] = tree[key]
        else:
            tree.insert(key, copy.deepcopy(tree[key]))
        return


def change_bytes(parts: Parts, rng: random.Random) -> None:
    """Change, cut or lengthen the bytes of one tensor, its shape with them."""
    name = rng.choice(list(parts.tensors))
    code, shape, body = parts.tensors[name]
    new = bytearray(body)
    if new and rng.random() < 0.7:
        for _ in range(rng.choice([1, 1, 4])):
            new[rng.randrange(len(new))] = rng.randrange(256)
    elif rng.random() < 0.5:
        new += rng.randbytes(rng.choice([1, 4, 8]))
    else:
        del new[len(new) - rng.choice([1, 4, 8]) :]
    parts.tensors[name] = (code, [len(new)] if code == "U8" and len(shape) == 1 else shape, bytes(new))


def change_coding(parts: Parts, rng: random.Random) -> None:
    """Claim another code, frequency, axis or shape for a mask; often a count of ones that fits what is then read."""
    about = rng.choice(parts.content["tensors"])
    what = rng.randrange(5)
    if what == 0:
        about["shape"] = rng.choice(
            [about["shape"][::-1], [*about["shape"], 1], [max(1, n // 2) for n in about["shape"]]]
        )
    elif what == 1:
        about["coding"] = rng.choice(["raw", "ans", "channel"])
        about.pop("frequency", None)
        about.pop("axis", None)
        about |= {"raw": {}, "ans": {"frequency": rng.randrange(1, 1 << 24)}, "channel": {"axis": rng.randrange(2)}}[
            about["coding"]
        ]
    elif what == 2 and "frequency" in about:
        about["frequency"] = rng.choice([1, (1 << 24) - 1, rng.randrange(1, 1 << 24)])
    elif what == 3 and "axis" in about:
        about["axis"] ^= 1
    else:
        about["shape"] = [rng.choice([0, 1, 5, 30, 4096, 1 << 20]) for _ in range(rng.randrange(4))]
    if rng.random() < 0.7:
        about["ones"] = rng.randrange(max(1, min(1 << 20, _product(about["shape"]) + 1)))


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def originals() -> list[bytes]:
    """Good files of every form and coding."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(8, generator=generator) ** 3
    masks = {
        "conv.weight": torch.rand(8, 10, 3, 3, generator=generator) < rows[:, None, None, None],
        "w": torch.rand(300, generator=generator) < 0.05,
        "odd": torch.rand(3, 7, generator=generator) < 0.5,
    }
    state = {"bn.running_mean": torch.randn(8, generator=generator), "fc.weight": torch.randn(2, 8).half()}
    plain = make_domain(
        "sketch", masks, state=state, classes=["dog", "house"], options={"tau": 1.0, "a": [1]}, method="m"
    )
    edits = {name: torch.randn(int((~mask).sum()), generator=generator).half() for name, mask in masks.items()}
    signs = {n: torch.randint(0, 255, ((m.numel() + 7) // 8,), dtype=torch.uint8) for n, m in masks.items()}
    records = [
        plain,
        make_domain("e", masks, form="edit", values=edits),
        make_domain("t", masks, form="ternary", values=signs),
    ]
    return [encode_domain(record, coding) for record in records for coding in ("raw", "coded")]


def mutant(rng: random.Random, good: list[Parts]) -> bytes:
    """One mutated file."""
    parts = copy.deepcopy(rng.choice(good))
    table = None
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        action = rng.random()
        with contextlib.suppress(KeyError, TypeError, IndexError, ValueError, AttributeError):  # spoilt before
            if action < 0.35:
                change_bytes(parts, rng)
            elif action < 0.65:
                change_coding(parts, rng)
            elif action < 0.85:
                spoil(parts.content, rng)
            else:
                table = rng
    return put_together(parts, table)


def judge(path: Path) -> str:
    """Why the file was refused, by its field, or "accepted"; AssertionError when it was accepted wrongly."""
    try:
        record = MaskFile(path).load()
    except MaskFileError as error:
        message = str(error)
        assert message.startswith(f"{path}: "), message
        assert "\n" not in message
        assert len(message) < 1500
        return message[len(str(path)) + 2 :].split(":")[0][:20]
    if sum(record.info.layout.numels) > MOST_READ:
        return "accepted, large"
    content, masks = reader.read(path)
    assert content["domain"] == record.info.domain
    for name, mask in record.masks().items():
        assert mask.reshape(-1).int().tolist() == masks[name], f"{name} is not what the format's page says"
    return "accepted"


@dataclass
class Verdict:
    """What became of a campaign's files; slowest in seconds, peak in MiB beyond where it began."""

    fates: Counter[str]
    slowest: float
    peak: float


def campaign(count: int, seed: int) -> Verdict:
    """Judge `count` mutants. AssertionError, or any error that is no MaskFileError, is a find."""
    rng, good = random.Random(seed), [take_apart(data) for data in originals()]
    fates: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(count):
            data = mutant(rng, good)
            path.unlink(missing_ok=True)
            path.write_bytes(data)
            start = time.process_time()
            try:
                fates[judge(path)] += 1
            except Exception:
                print(f"seed {seed}: {data!r}", file=sys.stderr)
                raise
            slowest = max(slowest, time.process_time() - start)
    return Verdict(fates, slowest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    print(campaign(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
