"""Files from strangers: every one is refused with the file's name and a field, or means what the original meant.

DWM_FAST_FUZZ sets the number of broken files of each kind (default 500; a full campaign uses 25000).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwm_fast.bank import MaskFile, encode_domain, make_domain, read_foreign, read_rows, write_mask_file
from dwm_fast.bank.content import most_coded_weights
from dwm_fast.bank.header import is_mask_file
from dwm_fast.bank.record import DomainMasks
from dwm_fast.errors import MaskFileError

from . import fuzz

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
    text += b" " * (-(len(text) + 8) % 64)
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
        assert 8 * record.bits.numel() <= most_coded_weights(len(data)) + 128 * len(record.info.ones)
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
    ("dimensions", r"odd.shape: expected a list of at most 16", lambda t, c: c["tensors"][2].update(shape=[1] * 17)),
    ("long", r"method: expected text of at most 4096", lambda t, c: c.update(method="x" * 4097)),
    ("half", r"method: expected text", lambda t, c: c.update(method="\ud800")),
    ("classes", r"classes: expected a list of text", lambda t, c: c.update(classes=["x" * 4097])),
    ("backbone", r"backbone: expected 64 lower-case", lambda t, c: c.update(backbone="F" * 64)),
    ("hex", r"sha256: expected", lambda t, c: c.update(checksums="g" * 64)),
    ("key", r"content: 'note' is unknown to this version", lambda t, c: c.update(note="")),
    ("entry", r"odd: 'frequency' is unknown", lambda t, c: c["tensors"][2].update(frequency=5)),
    ("deep", r"options: options are more than 32 levels", lambda t, c: c["options"].update(a=_nested(40))),
    ("digits", r"options: options hold '1000", lambda t, c: c["options"].update(a=10**400)),
    ("infinite", r"content: not valid JSON .Infinity is not", lambda t, c: c["options"].update(a=float("inf"))),
    ("nameless", r"tensor name: '' is not printable", lambda t, c: t.update({"": t.pop("bits.odd")})),
    ("name", r"tensor name: .* is not printable", lambda t, c: t.update({"x" * 513: t.pop("bits.odd")})),
    ("nul", r"tensor name: 'bits.o.*' is not printable", lambda t, c: t.update({"bits.o\0d": t.pop("bits.odd")})),
]


def _nested(depth: int) -> Any:
    return [_nested(depth - 1)] if depth else 0


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


def _resealed(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The file with the text of its header changed, sealed again."""
    length = int.from_bytes(data[:8], "little")
    text = change(re.sub(rb'"seal":"[0-9a-f]*"', b'"seal":"' + b"0" * 64 + b'"', data[8 : 8 + length]))
    raw = len(text).to_bytes(8, "little") + text
    seal = hashlib.sha256(raw).hexdigest().encode()
    return raw.replace(b'"seal":"' + b"0" * 64, b'"seal":"' + seal, 1) + data[8 + length :]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("1e999 is beyond any float", lambda text: text.replace(b"1.0", b"1e999").removesuffix(b"  ")),
        ("__metadata__: 'note' is unknown", lambda text: text.replace(b'"version":"1"', b'"version":"1","note":"x"')),
        ("'note' is unknown", lambda text: text.replace(b'"version":"1"', b'"version":"1","note":7')),
        ("version: found '1'", lambda text: text.replace(b'"version":"1"', b'"version":1')),
        ("expected a multiple of 64", lambda text: text + b" " * 8),
    ],
)
def test_a_header_that_is_not_as_the_page_says_is_refused(
    message: str, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    original = _domain()
    data = encode_domain(original, "raw")
    path.write_bytes(_resealed(data, lambda text: text))
    assert _same(MaskFile(path).load(), original)
    path.write_bytes(_resealed(data, change))
    refused = _load(path)
    assert isinstance(refused, str)
    assert message in refused


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", Path("/dev/zero"), Path("/dev/null"), tmp_path):
        with pytest.raises(MaskFileError, match="is no ordinary file"):
            MaskFile(path)
        with pytest.raises(MaskFileError, match="is no ordinary file"):
            is_mask_file(path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800x"])
def test_paths_that_no_system_has_are_refused(name: str, tmp_path: Path) -> None:
    for read in (MaskFile, is_mask_file, read_foreign, lambda path: read_rows(path.parent / name)):
        with pytest.raises(MaskFileError, match=r"cannot be read|no such folder"):
            read(tmp_path / name)
    with pytest.raises(MaskFileError, match="cannot write"):
        write_mask_file(tmp_path / name, _domain())


@pytest.mark.parametrize(
    ("shape", "axis"),
    [([42_000_000], None), ([1000, 42000], 0), ([1000, 42000], 1), ([2, 21_000_000], 0), ([42_000_000], 0)],
    ids=str,
)
def test_decoding_needs_little_more_memory_than_the_packed_bits(
    shape: list[int], axis: int | None, tmp_path: Path
) -> None:
    """100 KB of code that claim as much as they may: what is taken beside 2 x the packed bits stays below 64 MB."""
    parts = fuzz.take_apart(encode_domain(make_domain("sketch", {"w": torch.ones(5, 5, dtype=torch.bool)}), "raw"))
    levels = random.Random(0).randbytes(0 if axis is None else min(shape[axis], 100_000))
    body = bytes(level % 64 for level in levels) + random.Random(1).randbytes(100_000)
    rule = {"coding": "ans", "frequency": 1 << 23} if axis is None else {"coding": "channel", "axis": axis}
    parts.content["tensors"] = [{"name": "w", "shape": shape, "ones": 1, **rule}]
    parts.tensors["bits.w"] = ("U8", [len(body)], body)
    path = tmp_path / "x.safetensors"
    path.write_bytes(fuzz.put_together(parts))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MaskFileError, match=r"w.ones|w.axis|longer than its tensor"):
        MaskFile(path).load()
    used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert used < 2 * math.prod(shape) / 8 + (64 << 20)


def test_mutants_with_right_checksums_are_refused_or_read_as_the_page_says() -> None:
    verdict = fuzz.campaign(max(ROUNDS, 2000), seed=5)
    assert verdict.fates["accepted"] > 0
    assert verdict.slowest < 1.0
    assert verdict.peak < 64


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(MaskFileError, match=r"none.safetensors: cannot be read: No such file"):
        MaskFile(tmp_path / "none.safetensors")
    with pytest.raises(MaskFileError, match=r"file: is no ordinary file"):
        MaskFile(tmp_path)


def test_a_later_version_asks_for_a_newer_release(tmp_path: Path) -> None:
    data = encode_domain(_domain(), "raw").replace(b'"version":"1"', b'"version":"2"')
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(MaskFileError, match=r"version: found '2'; this release reads version 1; install a newer"):
        MaskFile(tmp_path / "x.safetensors")


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """A code of a few bytes may claim any number of weights: 2^24 and 256 for each byte of the file are read."""
    record = make_domain("sketch", {"w": torch.zeros(100_000, dtype=torch.bool)})
    table, content, payload = _open(encode_domain(record, "coded"))
    assert content["tensors"][0]["coding"] == "ans"
    content["tensors"][0].update(shape=[2**45])
    path = tmp_path / "x.safetensors"
    path.write_bytes(_reseal(table, content, payload))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        MaskFileError, match=r"tensors: 35184372088832 coded weights in \d+ bytes; at most \d+ are read"
    ):
        MaskFile(path).load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_mask_of_any_density_stays_within_the_limit_that_readers_set(tmp_path: Path) -> None:
    record = make_domain("sketch", {"w": torch.ones(1 << 24, dtype=torch.bool)})
    data = encode_domain(record, "coded")
    assert len(data) < 20_000
    (tmp_path / "x.safetensors").write_bytes(data)
    assert torch.equal(MaskFile(tmp_path / "x.safetensors").load().bits, record.bits)
