"""Entropy coding of one tensor's bits: an ANS coder with one probability, or a quantised one per channel.

The coder is the 64-bit-state, 32-bit-word, 24-bit-precision asymmetric numeral system of `constriction` (an
optional package, imported at first use). Frequencies are whole numbers, so another program decodes exactly;
docs/format.md has the procedure.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dwm_fast.errors import BackendUnavailable

Bytes = NDArray[np.uint8]

PRECISION = 24
_TOTAL = 1 << PRECISION
LEVELS = 64
_CHUNK = 1 << 18
"""Weights that are coded, or put in order, in one piece; a multiple of 8."""
_BLOCK = 1 << 21
"""Weights whose channels are put in order in one piece: the more, the longer the runs of bytes that are read."""
_STATE_BITS = 64


def _level_frequencies() -> tuple[int, ...]:
    inner = LEVELS - 2
    whole = 2 * inner
    odds = range(1, whole, 2)
    middle = [odd**2 * (3 * whole - 2 * odd) * _TOTAL // whole**3 for odd in odds]
    return (1, *middle, _TOTAL - 1)


LEVEL_FREQUENCIES = _level_frequencies()
"""Frequency of a one, of 2^24, per level: t^2 (3 - 2t) with t = (k - 1/2) / 62 for k in 1 ..

62, and both ends.
"""

_ONE_COST = PRECISION - np.log2(np.array(LEVEL_FREQUENCIES, dtype=np.float64))
_ZERO_COST = PRECISION - np.log2(_TOTAL - np.array(LEVEL_FREQUENCIES, dtype=np.float64))
"""Bits that a one and a zero cost at each level."""

_LEVEL_BOUNDS = 1 / (1 + (_ONE_COST[:-1] - _ONE_COST[1:]) / (_ZERO_COST[1:] - _ZERO_COST[:-1]))
"""Rate of ones at which a level and the next cost the same."""

_LEAST_WIDTH = 16
"""Weights per channel below which a level a channel, 8 bits, cannot pay."""


@dataclass(frozen=True)
class Plan:
    """How one tensor's bits are stored.

    coding: "raw" (packed bits), "ans" (one frequency) or "channel" (one level per index of dimension `axis`).
    frequency: of a one, in 1 .. 2^24 - 1, for "ans" only. bits: the size that the model predicts.
    """

    coding: str
    bits: float
    frequency: int = 0
    axis: int = 0
    levels: Bytes | None = None


class Undecodable(ValueError):
    """The stored bytes are not the code of that many bits."""


class _Coder(Protocol):
    def encode_reverse(self, symbols: NDArray[np.int32], model: Any) -> None: ...
    def decode(self, model: Any, amount: int) -> NDArray[np.int32]: ...
    def get_compressed(self) -> NDArray[np.uint32]: ...
    def is_empty(self) -> bool: ...


def _constriction() -> Any:
    try:
        return importlib.import_module("constriction").stream
    except ImportError as error:
        raise BackendUnavailable(
            "coded mask files need the package 'constriction'; type: pip install 'dwm-fast[coding]'"
        ) from error


def plan(keep: Bytes, shape: tuple[int, ...]) -> Plan:
    """The smallest way to store `keep` (flat, zeros and ones) of a tensor of `shape`, side information included."""
    n = keep.size
    raw = Plan("raw", 8.0 * ((n + 7) // 8))
    if n == 0:
        return raw
    ones = int(np.count_nonzero(keep))
    frequency = min(max(round(ones * _TOTAL / n), 1), _TOTAL - 1)
    best = min(raw, Plan("ans", _cost(ones, n, frequency) + _STATE_BITS, frequency=frequency), key=_bits)
    for axis in range(min(2, len(shape))):
        if 1 < shape[axis] <= n // _LEAST_WIDTH:
            best = min(best, _channel_plan(keep.reshape(shape), axis), key=_bits)
    return best


def _bits(plan: Plan) -> float:
    return plan.bits


def _cost(ones: int, n: int, frequency: int) -> float:
    zeros = n - ones
    return ones * (PRECISION - math.log2(frequency)) + zeros * (PRECISION - math.log2(_TOTAL - frequency))


def _channel_plan(keep: Bytes, axis: int) -> Plan:
    others = tuple(d for d in range(keep.ndim) if d != axis)
    width = keep.size // keep.shape[axis]
    ones = np.count_nonzero(keep, axis=others).astype(np.float64)
    levels = np.searchsorted(_LEVEL_BOUNDS, ones / width)
    total = float(ones @ _ONE_COST[levels] + (width - ones) @ _ZERO_COST[levels])
    return Plan("channel", total + 8.0 * levels.size + _STATE_BITS, axis=axis, levels=levels.astype(np.uint8))


def encode(keep: Bytes, shape: tuple[int, ...], plan: Plan) -> Bytes:
    """The stored bytes of `keep` under `plan`."""
    if plan.coding == "raw":
        return np.packbits(keep, bitorder="little")
    coder: _Coder = _constriction().stack.AnsCoder()
    if plan.levels is None:
        _encode_run(coder, keep, plan.frequency)
        return _words_to_bytes(coder)
    rows = np.moveaxis(keep.reshape(shape), plan.axis, 0).reshape(shape[plan.axis], -1)
    for level in np.unique(plan.levels)[::-1]:
        _encode_run(coder, rows[plan.levels == level].reshape(-1), LEVEL_FREQUENCIES[level])
    return np.concatenate([plan.levels, _words_to_bytes(coder)])


def decode(stored: Bytes, shape: tuple[int, ...], plan: Plan) -> Bytes:
    """The packed bits (LSB first, ceil(n / 8) bytes) of an "ans" or "channel" tensor, decoded in pieces.

    Beside the result it takes a few megabytes, whatever the shape. Undecodable where `stored` is no code of n bits.
    """
    n = math.prod(shape)
    packed = np.zeros((n + 7) // 8, dtype=np.uint8)
    if plan.coding == "ans":
        coder = _open(stored)
        for start, run in _decode_runs(coder, n, plan.frequency):
            packed[start // 8 : start // 8 + (run.size + 7) // 8] = np.packbits(run, bitorder="little")
    else:
        channels = shape[plan.axis]
        coder = _open(stored[channels:])
        _decode_channels(coder, stored[:channels], shape, plan.axis, packed)
    if not coder.is_empty():
        raise Undecodable("the code is longer than its tensor")
    return packed


def _decode_channels(coder: _Coder, levels: Bytes, shape: tuple[int, ...], axis: int, packed: Bytes) -> None:
    """Fill `packed` with the bits of all channels."""
    if levels.size and levels.max() >= LEVELS:
        raise Undecodable(f"a channel level is beyond {LEVELS - 1}")
    if packed.size == 0:
        return
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    rows = _decode_rows(coder, levels, outer * inner)
    done, rest = 0, np.zeros(0, dtype=np.uint8)
    for bits in _in_order(rows, outer, inner):
        bits = np.concatenate([rest, bits])
        whole = bits.size // 8
        packed[done : done + whole] = np.packbits(bits[: 8 * whole], bitorder="little")
        done, rest = done + whole, bits[8 * whole :]
    packed[done:] = np.packbits(rest, bitorder="little")


def _decode_rows(coder: _Coder, levels: Bytes, width: int) -> Bytes:
    """The packed bits of every channel, (channels, ceil(width / 8)), read in the order in which they were coded."""
    rows = np.empty((levels.size, (width + 7) // 8), dtype=np.uint8)
    together = max(1, _CHUNK // width)
    order, counts = np.argsort(levels, kind="stable"), np.bincount(levels)
    for level, channels in zip(range(counts.size), np.split(order, np.cumsum(counts)[:-1]), strict=True):
        model = _model(LEVEL_FREQUENCIES[level])
        for first in range(0, channels.size, together):
            some = channels[first : first + together]
            for start in range(0, width, _CHUNK):  # more than one where a channel alone is larger
                stop = min(start + _CHUNK, width)
                bits = coder.decode(model, some.size * (stop - start)).astype(np.uint8).reshape(some.size, -1)
                rows[some, start // 8 : (stop + 7) // 8] = np.packbits(bits, axis=1, bitorder="little")
    return rows


def _in_order(rows: Bytes, outer: int, inner: int) -> Iterator[Bytes]:
    """The bits of channels of shape (outer, inner), row by row as (outer, channels, inner), in pieces."""
    channels = len(rows)
    if 8 * channels * inner <= _BLOCK:
        step = 8 * (_BLOCK // (8 * channels * inner))  # whole bytes of every channel
        for start in range(0, outer, step):
            stop = min(start + step, outer)
            bits = _unpacked(rows, start * inner, stop * inner).reshape(channels, stop - start, inner)
            yield bits.transpose(1, 0, 2).reshape(-1)
        return
    together = max(1, _CHUNK // inner)
    for place in range(0, outer * inner, inner):
        for first in range(0, channels, together):
            for start in range(place, place + inner, _CHUNK):
                stop = min(start + _CHUNK, place + inner)
                yield _unpacked(rows[first : first + together], start, stop).reshape(-1)


def _unpacked(rows: Bytes, start: int, stop: int) -> Bytes:
    """Bits start .. stop of every packed row."""
    bits = np.unpackbits(rows[:, start // 8 : (stop + 7) // 8], axis=1, bitorder="little")
    return bits[:, start % 8 : start % 8 + stop - start]


def _encode_run(coder: _Coder, keep: Bytes, frequency: int) -> None:
    model = _model(frequency)
    for stop in range(keep.size, 0, -_CHUNK):
        coder.encode_reverse(keep[max(0, stop - _CHUNK) : stop].astype(np.int32), model)


def _decode_runs(coder: _Coder, amount: int, frequency: int) -> Iterator[tuple[int, Bytes]]:
    """The next `amount` bits in pieces, each with its place."""
    model = _model(frequency)
    for start in range(0, amount, _CHUNK):
        yield start, coder.decode(model, min(_CHUNK, amount - start)).astype(np.uint8)


@lru_cache(maxsize=LEVELS)
def _model(frequency: int) -> Any:
    return _constriction().model.Bernoulli(frequency / _TOTAL, perfect=True)


def _open(stored: Bytes) -> _Coder:
    if stored.size % 4:
        raise Undecodable(f"{stored.size} bytes are not whole 32-bit words")
    words = np.frombuffer(stored.tobytes(), dtype="<u4").astype(np.uint32)
    if words.size and words[-1] == 0:
        raise Undecodable("the last word is zero")
    coder: _Coder = _constriction().stack.AnsCoder(words)
    return coder


def _words_to_bytes(coder: _Coder) -> Bytes:
    words = coder.get_compressed().astype("<u4")
    return np.frombuffer(words.tobytes(), dtype=np.uint8)
