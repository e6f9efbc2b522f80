"""Coded bits come back in every shape, decoded in pieces of any size, in a time bounded by the file."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwm_fast.bank import coding as codes
from dwm_fast.bank.content import most_coded_weights

pytest.importorskip("constriction")

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda shape: math.prod(shape) <= 4000)


@settings(deadline=None)
@given(
    shape=SHAPES,
    axis=st.integers(0, 1),
    chunk=st.sampled_from([8, 24, 64, 1 << 18]),
    block=st.sampled_from([8, 200, 1 << 21]),
    seed=st.integers(0, 1000),
)
def test_channels_come_back_whatever_the_pieces(shape: list[int], axis: int, chunk: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axis = min(axis, len(shape) - 1)
    keep = (rng.random(shape) < rng.random()).astype(np.uint8)
    levels = rng.integers(0, codes.LEVELS, shape[axis]).astype(np.uint8)
    plan = codes.Plan("channel", 0.0, axis=axis, levels=levels)
    with patch.object(codes, "_CHUNK", chunk), patch.object(codes, "_BLOCK", block):
        stored = codes.encode(keep.reshape(-1), tuple(shape), plan)
        packed = codes.decode(stored, tuple(shape), codes.Plan("channel", 0.0, axis=axis))
    assert np.array_equal(packed, np.packbits(keep.reshape(-1), bitorder="little"))


def _seconds(shape: tuple[int, ...], axis: int | None, levels: np.ndarray | None) -> float:
    """CPU seconds, the better of two, for decoding noise as a mask of this shape."""
    code = np.random.default_rng(0).integers(1, 255, 100_000 if levels is None else 100_000 - levels.size // 4 * 4)
    stored = np.concatenate([[] if levels is None else levels, code]).astype(np.uint8)
    plan = codes.Plan("ans", 0.0, frequency=1 << 23) if axis is None else codes.Plan("channel", 0.0, axis=axis)

    def once() -> float:
        start = time.process_time()
        with contextlib.suppress(codes.Undecodable):
            codes.decode(stored, shape, plan)
        return time.process_time() - start

    return min(once(), once())


LEVELS: list[tuple[str, Callable[[int], np.ndarray]]] = [
    ("all ones", lambda n: np.full(n, 63)),
    ("mixed", lambda n: np.arange(n) * 7 % 64),
]


@pytest.mark.parametrize(("levels", "make"), LEVELS, ids=[name for name, _ in LEVELS])
@pytest.mark.parametrize(("shape", "axis"), [((1000, 41_000), 0), ((1000, 41_000), 1), ((512, 40_000, 2), 1)], ids=str)
def test_putting_channels_in_order_costs_less_than_decoding_them(
    shape: tuple[int, ...], axis: int, levels: str, make: Callable[[int], np.ndarray]
) -> None:
    """So 100 KB cost at most twice 42 million decoded weights, which take 0.4 s on one core of an AMD EPYC.

    Not in seconds, which depend on what else runs.
    """
    assert math.prod(shape) <= most_coded_weights(100_000)
    assert _seconds(shape, axis, make(shape[axis])) < 2 * _seconds((math.prod(shape),), None, None)


def test_no_weights_take_no_time_whatever_their_shape_says() -> None:
    for shape in ((1 << 40, 0), (0, 1 << 40), (1 << 40, 1, 0)):
        for axis in (0, 1):
            levels = np.zeros(shape[axis] if shape[axis] < 9 else 0, dtype=np.uint8)
            if levels.size == shape[axis]:
                assert codes.decode(levels, shape, codes.Plan("channel", 0.0, axis=axis)).size == 0
