"""Files from strangers: every one is refused with the file's name and a field, or means what the original meant.

DWM_FAST_FUZZ sets the number of broken files of each kind (default 500; a full campaign uses 25000).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwm_fast.bank import MaskFile, encode_domain, make_domain
from dwm_fast.bank.record import DomainMasks
from dwm_fast.errors import MaskFileError

ROUNDS = int(os.environ.get("DWM_FAST_FUZZ", "500"))


def _domain() -> DomainMasks:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(8, generator=generator) ** 3
    masks = {
        "conv.weight": torch.rand(8, 30, 3, 3, generator=generator) < rows[:, None, None, None],
        "sparse": torch.rand(600, generator=generator) < 0.05,
        "odd": torch.rand(3, 7, generator=generator) < 0.5,
    }
    state = {"bn.running_mean": torch.randn(8, generator=generator), "fc.weight": torch.randn(2, 8).half()}
    return make_domain("sketch", masks, state=state, classes=["dog", "house"], options={"tau": 1.0}, method="m")


def _same(a: DomainMasks, b: DomainMasks) -> bool:
    tensors = [(a.bits, b.bits), *((a.state[n], b.state[n]) for n in a.state)]
    return a.info == b.info and set(a.state) == set(b.state) and all(torch.equal(x, y) for x, y in tensors)


def _load(path: Path) -> DomainMasks | str:
    """The domain, or the message of a proper refusal."""
    try:
        return MaskFile(path).load()
    except MaskFileError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 1500
    return message


def _check(path: Path, data: bytes, original: DomainMasks) -> str:
    path.write_bytes(data)
    record = _load(path)
    if isinstance(record, str):
        return record
    assert _same(record, original)
    return ""


def _mutate(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        place = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 1600))
        kind = rng.randrange(5)
        if kind == 0:
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place] = rng.randrange(256)
        elif kind == 2:
            del out[place : place + rng.randrange(1, 9)]
        elif kind == 3:
            out[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            other = rng.randrange(len(out))
            out[place : place + 8] = out[other : other + 8]
    return bytes(out)


@pytest.mark.parametrize("coding", ["raw", "coded"])
def test_broken_files_are_refused_or_mean_the_same(coding: str, tmp_path: Path) -> None:
    original = _domain()
    data = encode_domain(original, coding)
    rng = random.Random(1)
    accepted = 0
    for _ in range(ROUNDS):
        broken = data[: rng.randrange(len(data))] if rng.random() < 0.2 else _mutate(data, rng)
        accepted += not _check(tmp_path / "x.safetensors", broken, original)
    assert accepted < ROUNDS / 10


def _reseal(table: dict[str, Any], content: Any, payload: bytes) -> bytes:
    """A file whose header is wrong but correctly sealed: only the checks behind the seal can refuse it."""
    metadata = {"content": json.dumps(content), "format": "dwm-fast-mask", "seal": "0" * 64, "version": "1"}
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    raw = len(text).to_bytes(8, "little") + text
    seal = hashlib.sha256(raw).hexdigest()
    return raw.replace(b'"seal":"' + b"0" * 64, b'"seal":"' + seal.encode(), 1) + payload


def _open(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    content = json.loads(table.pop("__metadata__")["content"])
    return table, content, data[8 + length :]


STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    1.5,
    1e300,
    "",
    "x",
    "raw",
    "ans",
    "channel",
    "\ud800",
    "x" * 5000,
    [],
    [[]],
    [-1],
    [2**40],
    [2**40, 0],
    [2**52, 2**52],
    {},
    {"a": 1},
    [None],
    "bits.sparse",
]


def _spoil(tree: Any, rng: random.Random) -> None:
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
        if action < 0.7:
            tree[key] = copy.deepcopy(rng.choice(STRANGE))
        elif action < 0.85:
            del tree[key]
        elif isinstance(tree, dict):
            tree[str(rng.choice(STRANGE))[:600]] = tree[key]
        else:
            tree.insert(key, copy.deepcopy(tree[key]))
        return


@pytest.mark.parametrize("coding", ["raw", "coded"])
def test_hostile_headers_with_a_right_seal_are_refused_or_change_descriptions_only(coding: str, tmp_path: Path) -> None:
    original = _domain()
    data = encode_domain(original, coding)
    rng = random.Random(2)
    path = tmp_path / "x.safetensors"
    for _ in range(ROUNDS):
        table, content, payload = _open(data)
        for _ in range(rng.choice([1, 1, 2])):
            _spoil(rng.choice([table, content, content]), rng)
        path.write_bytes(_reseal(table, content, payload))
        record = _load(path)
        if isinstance(record, str):
            continue
        assert record.bits.numel() < 4096 * len(data)
        for name, mask in record.masks().items():
            if name in original.info.layout.names and mask.shape == original.masks()[name].shape:
                assert torch.equal(mask, original.masks()[name])


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    original = _domain()
    for coding in ("raw", "coded"):
        data = encode_domain(original, coding)
        for length in range(0, len(data), 7):
            assert _check(tmp_path / "x.safetensors", data[:length], original)


Change = Callable[[dict[str, Any], dict[str, Any]], object]
CHANGES: list[tuple[str, str, Change]] = [
    ("empty", r"domain: expected text", lambda t, c: c.clear()),
    ("dtype", r"bits.odd.dtype: 'F8' is not one of", lambda t, c: t["bits.odd"].update(dtype="F8")),
    ("shape", r"odd.shape: \[3, 70\] needs 27 bytes", lambda t, c: c["tensors"][2].update(shape=[3, 70])),
    ("count", r"odd.ones: the header says 3, the bits hold", lambda t, c: c["tensors"][2].update(ones=3)),
    ("overlap", r"data_offsets: starts at byte", lambda t, c: t["bits.odd"].update(data_offsets=[0, 3])),
    ("missing", r"bits.ghost: missing", lambda t, c: c["tensors"][2].update(name="ghost")),
    ("order", r"bit_order", lambda t, c: c.update(bit_order="msb-first")),
    ("form", r"form: 'sum' is not one of", lambda t, c: c.update(form="sum")),
    ("domain", r"domain: domain '\.\./x' cannot name", lambda t, c: c.update(domain="../x")),
    ("coding", r"odd.coding: 'zip' is not", lambda t, c: c["tensors"][2].update(coding="zip")),
    ("reference", r"reference: expected", lambda t, c: c.update(reference={"domain": "a", "bits": "b"})),
    ("sums", r"sha256: checksum differs", lambda t, c: c.update(checksums="0" * 64)),
    ("huge", r"conv.weight.shape|weights in", lambda t, c: c["tensors"][0].update(shape=[2**50])),
    ("product", r"conv.weight.shape: the number of elements", lambda t, c: c["tensors"][0].update(shape=[2**52] * 3)),
]


@pytest.mark.parametrize(("what", "message", "change"), CHANGES, ids=[c[0] for c in CHANGES])
def test_a_wrong_field_is_named(what: str, message: str, change: Change, tmp_path: Path) -> None:
    table, content, payload = _open(encode_domain(_domain(), "raw"))
    change(table, content)
    path = tmp_path / "x.safetensors"
    path.write_bytes(_reseal(table, content, payload))
    with pytest.raises(MaskFileError, match=message):
        MaskFile(path).load()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header length: 0 bytes"),
        (b"\xff" * 8, "header length: 18446744073709551615 bytes in a file of 8"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "header length"),
        ((2).to_bytes(8, "little") + b"{}", "format: not a mask file"),
        ((2).to_bytes(8, "little") + b"[]", "header: expected a JSON object"),
        ((40000).to_bytes(8, "little") + b"[" * 40000, "header: not valid JSON"),
        ((13).to_bytes(8, "little") + b'{"a":1,"a":2}', "header: not valid JSON .a key appears twice"),
        ((9).to_bytes(8, "little") + b'{"a":NaN}', "header: not valid JSON .NaN is not allowed"),
        ((5).to_bytes(8, "little") + b"\xff\xfe\x00{}", "header: not valid JSON"),
        ((6005).to_bytes(8, "little") + b'{"a":' + b"9" * 6000, "header: not valid JSON"),
    ],
)
def test_files_that_are_no_mask_files_say_so(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(MaskFileError, match=message):
        MaskFile(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(MaskFileError, match=r"none.safetensors: cannot be read: No such file"):
        MaskFile(tmp_path / "none.safetensors")
    with pytest.raises(MaskFileError, match=r"header length"):
        MaskFile(tmp_path)


def test_a_later_version_asks_for_a_newer_release(tmp_path: Path) -> None:
    data = encode_domain(_domain(), "raw").replace(b'"version":"1"', b'"version":"2"')
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(MaskFileError, match=r"version: found '2'; this release reads version 1; install a newer"):
        MaskFile(tmp_path / "x.safetensors")


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """A code of a few bytes may claim any number of weights: the limit is 4096 for each byte of the file."""
    record = make_domain("sketch", {"w": torch.zeros(100_000, dtype=torch.bool)})
    table, content, payload = _open(encode_domain(record, "coded"))
    assert content["tensors"][0]["coding"] == "ans"
    content["tensors"][0].update(shape=[2**45])
    path = tmp_path / "x.safetensors"
    path.write_bytes(_reseal(table, content, payload))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MaskFileError, match=r"tensors: 35184372088832 weights in \d+ bytes; at most 4096 a byte"):
        MaskFile(path).load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_mask_of_any_density_stays_within_the_limit_that_readers_set(tmp_path: Path) -> None:
    record = make_domain("sketch", {"w": torch.ones(1 << 24, dtype=torch.bool)})
    data = encode_domain(record, "coded")
    assert len(data) < 20_000
    (tmp_path / "x.safetensors").write_bytes(data)
    assert torch.equal(MaskFile(tmp_path / "x.safetensors").load().bits, record.bits)
