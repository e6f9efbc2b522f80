"""Kernels run on a GPU where there is one, else under Triton's interpreter; oracles below use neither."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports dwm_fast.kernels

import numpy as np
import pytest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Oracle:
    """The noise and bit contracts in NumPy, and the mask rules of METHODS section 1 in fp64."""

    @staticmethod
    def philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
        """Philox4x32-10 on uint64 arrays that hold 32-bit values."""
        c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
        k0, k1 = (np.uint64(k) for k in key)
        low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
        for _ in range(10):
            p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
            c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        return [c0, c1, c2, c3]

    @classmethod
    def uniform(cls, first: int, numel: int, seed: int, step: int, layer: int) -> np.ndarray:
        """u of elements first .. first + numel - 1 as fp64; their words from counters (block, layer, step)."""
        element = np.arange(first, first + numel, dtype=np.uint64)
        block = element // np.uint64(4)
        seed, step = seed % 2**64, step % 2**32
        low, high = block & np.uint64(0xFFFFFFFF), block >> np.uint64(32)
        counter = [low, high, np.full_like(block, layer), np.full_like(block, step)]
        words = np.stack(cls.philox(counter, (seed & 0xFFFFFFFF, seed >> 32)))
        word = words[(element % np.uint64(4)).astype(np.int64), np.arange(numel)]
        u = (word >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24) + np.float32(2.0**-25)
        return np.minimum(u, np.float32(1 - 2.0**-24)).astype(np.float64)

    @staticmethod
    def bits(keeps: list[np.ndarray]) -> np.ndarray:
        """Network buffer: LSB first, every tensor on a fresh 16-byte boundary."""
        parts = []
        for keep in keeps:
            padded = np.zeros(-(-keep.size // 128) * 128, dtype=bool)
            padded[: keep.size] = keep.reshape(-1)
            parts.append(np.packbits(padded, bitorder="little"))
        return np.concatenate(parts)


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh buffer of the kernels with NaN (bytes with 0xFF), so that an element nobody wrote shows."""
    from dwm_fast.kernels import _tables

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        fresh = torch.empty(*size, **options)  # type: ignore[call-overload]
        return fresh.fill_(float("nan") if fresh.is_floating_point() else -1 if fresh.dtype != torch.uint8 else 255)

    monkeypatch.setattr(_tables, "empty", poisoned)
