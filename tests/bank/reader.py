"""An independent reader of mask files, written from docs/format.md alone: plain Python, slow, no dwm_fast."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any


def read(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The inner metadata and every mask as a flat list of zeros and ones."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "dwm-fast-mask"
    assert metadata["version"] == "1"
    blank = data[: 8 + length].replace(metadata["seal"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == metadata["seal"]
    content = json.loads(metadata["content"])
    tensors = {
        n: data[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]] for n, e in header.items()
    }
    _check_sums(header, tensors, content)
    masks = {about["name"]: _bits(about, tensors[f"bits.{about['name']}"]) for about in content["tensors"]}
    for about in content["tensors"]:
        if about.get("xor"):
            about_base, base = read(path.parent / f"{content['reference']['domain']}.safetensors")
            assert _digest(about_base, base) == content["reference"]["bits"]
            name = about["name"]
            masks[name] = [a ^ b for a, b in zip(masks[name], base[name], strict=True)]
        assert sum(masks[about["name"]]) == about["ones"]
    return content, masks


def _digest(content: dict[str, Any], masks: dict[str, list[int]]) -> str:
    tensors = content["tensors"]
    data = json.dumps([[about["name"] for about in tensors], [about["shape"] for about in tensors]]).encode()
    for about in tensors:
        bits = masks[about["name"]]
        groups = (bits[i : i + 8] for i in range(0, len(bits), 8))
        data += bytes(sum(bit << k for k, bit in enumerate(group)) for group in groups)
    return hashlib.sha256(data).hexdigest()[:32]


def _check_sums(header: dict[str, Any], tensors: dict[str, bytes], content: dict[str, Any]) -> None:
    sums = tensors["sha256"]
    assert hashlib.sha256(sums).hexdigest() == content["checksums"]
    names = sorted((n for n in header if n != "sha256"), key=lambda n: tuple(header[n]["data_offsets"]))
    for i, name in enumerate(names):
        assert hashlib.sha256(tensors[name]).digest() == sums[32 * i : 32 * i + 32]


def _bits(about: dict[str, Any], stored: bytes) -> list[int]:
    n, shape = math.prod(about["shape"]), about["shape"]
    if about["coding"] == "raw":
        return [stored[i // 8] >> i % 8 & 1 for i in range(n)]
    if about["coding"] == "ans":
        return _decode(stored, [about["frequency"]] * n)
    axis = about["axis"]
    levels, words = stored[: shape[axis]], stored[shape[axis] :]
    inner = math.prod(shape[axis + 1 :])
    channel_of = [i // inner % shape[axis] for i in range(n)]
    order = sorted(range(n), key=lambda i: (levels[channel_of[i]], channel_of[i]))
    flat = _decode(words, [_frequency(levels[channel_of[i]]) for i in order])
    bits = [0] * n
    for i, bit in zip(order, flat, strict=True):
        bits[i] = bit
    return bits


def _frequency(level: int) -> int:
    if level in (0, 63):
        return 1 if level == 0 else 2**24 - 1
    odd = 2 * level - 1
    return odd * odd * (3 * 124 - 2 * odd) * 2**24 // 124**3


def _decode(stored: bytes, frequencies: list[int]) -> list[int]:
    words = [int.from_bytes(stored[i : i + 4], "little") for i in range(0, len(stored), 4)]
    state = 0
    while state < 2**32 and words:
        state = state << 32 | words.pop()
    bits = []
    for ones in frequencies:
        zeros, low = 2**24 - ones, state % 2**24
        bit = int(low >= zeros)
        state = (ones if bit else zeros) * (state >> 24) + low - (zeros if bit else 0)
        if state < 2**32 and words:
            state = state << 32 | words.pop()
        bits.append(bit)
    assert state == 0
    assert not words
    return bits
