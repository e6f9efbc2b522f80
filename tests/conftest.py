"""Fixtures that every test may use: forced backends, poisoned buffers, and the oracle of noise and bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import dwm_fast


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def reference() -> Iterator[None]:
    """Every operation by the plain PyTorch reference."""
    with dwm_fast.use_backend("reference"):
        yield


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh buffers are full of NaN (integers: the largest value), so an element nobody wrote is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill


class Oracle:
    """The noise and bit contracts in NumPy, used by every test that needs random words or packed bits."""

    @staticmethod
    def philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
        """Philox4x32-10 on arrays that hold 32-bit values."""
        c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
        k0, k1 = (np.uint64(k) for k in key)
        low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
        for _ in range(10):
            p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
            c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        return [c0, c1, c2, c3]

    @classmethod
    def words(cls, elements: np.ndarray, seed: int, step: int, layer: int) -> np.ndarray:
        """The word of each element, uint64 below 2^32; seed is taken mod 2^64, step mod 2^32."""
        elements = np.asarray(elements, dtype=np.uint64)
        block, seed = elements // np.uint64(4), seed % 2**64
        low, high = block & np.uint64(0xFFFFFFFF), block >> np.uint64(32)
        counter = [low, high, np.full_like(block, layer), np.full_like(block, step % 2**32)]
        words = np.stack(cls.philox(counter, (seed & 0xFFFFFFFF, seed >> 32)))
        return words[(elements % np.uint64(4)).astype(np.int64), np.arange(len(elements))]

    @classmethod
    def uniform(cls, first: int, numel: int, seed: int, step: int, layer: int) -> np.ndarray:
        """u of elements first .. first + numel - 1, fp64."""
        return cls.uniform_of(cls.words(np.arange(first, first + numel, dtype=np.uint64), seed, step, layer))

    @staticmethod
    def uniform_of(words: np.ndarray) -> np.ndarray:
        """u of words: ((word >> 8) + 1/2) * 2^-24 rounded to fp32, in the tails (word + 1/2) * 2^-32; as fp64."""
        words = words.astype(np.int64)
        ordinary = (((words >> 8) + 0.5) * 2.0**-24).astype(np.float32).astype(np.float64)
        in_tail = (words < 2**16) | (words >= 2**32 - 2**16)
        return np.where(in_tail, (words + 0.5) * 2.0**-32, ordinary)

    @staticmethod
    def bits(keeps: list[np.ndarray]) -> np.ndarray:
        """Network buffer: LSB first, every tensor on a fresh 16-byte boundary."""
        parts = []
        for keep in keeps:
            padded = np.zeros(-(-keep.size // 128) * 128, dtype=bool)
            padded[: keep.size] = keep.reshape(-1)
            parts.append(np.packbits(padded, bitorder="little"))
        return np.concatenate(parts)


@pytest.fixture(scope="session")
def oracle() -> type[Oracle]:
    return Oracle


@pytest.fixture(scope="session")
def infinite_logits() -> Callable[[torch.device | str], None]:
    """Asserts, for whoever computes, that an infinite logit keeps or drops its weight for good and spoils nothing."""

    def check(device: torch.device | str) -> None:
        logits = torch.tensor([-math.inf, math.inf, -100.0, 100.0] * 8, device=device)
        weights, grads = torch.linspace(1, 2, 32, device=device), torch.linspace(-2, 2, 32, device=device)
        rng, tau, one = (
            torch.tensor([3, 4], device=device),
            torch.tensor(0.7, device=device),
            torch.ones(1, device=device),
        )
        chosen = torch.where(logits > 0, weights, 0.0)
        for mode in dwm_fast.ops.Mode:
            draw = (rng, tau, [0], [0.25], int(mode), 0)
            (masked,), _, penalty = torch.ops.dwm_fast.sample([logits], [weights], *draw, None, True)
            expected = {"TERNARY": weights * logits.sign(), "EDIT": weights + 0.25 * logits}.get(mode.name, chosen)
            # A soft mask of 1 is a GPU's reciprocal of 1 (1 ulp by the PTX manual) times the weight: 3 * 2^-24.
            rtol = 2.0**-22 if mode.name == "GUMBEL_SOFT" else 0.0
            torch.testing.assert_close(masked, expected, rtol=rtol, atol=1e-30)
            assert 0 <= penalty.item() <= 1
            moved, first, second = logits.clone(), torch.zeros_like(logits), torch.zeros_like(logits)
            rest = (one[0], one, one[0].double(), 0.9, 0.99, 1e-8, 0.0, True)
            torch.ops.dwm_fast.mask_adam([moved], [weights], [grads], [first], [second], *draw, *rest)
            assert torch.equal(moved[logits.isinf()], logits[logits.isinf()])
            (dlogits,), (dweights,) = torch.ops.dwm_fast.sample_backward(
                [grads], one[0], [logits], [weights], *draw, True, True
            )
            assert all(t.isfinite().all() for t in (moved[2:4], first, second, dlogits, dweights))
        wide = torch.full_like(grads, math.inf)
        for mode in ("GUMBEL_HARD", "KEEP", "THRESHOLD"):
            draw = (rng, tau, [0], [0.25], int(dwm_fast.ops.Mode[mode]), 0)
            _, (dweights,) = torch.ops.dwm_fast.sample_backward([wide], one[0], [logits], [weights], *draw, False, True)
            assert torch.equal(dweights, torch.where(logits > 0, wide, 0.0))

    return check
