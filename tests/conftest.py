"""Fixtures that every test may use: forced backends, poisoned buffers, and the noise contract's oracle."""

from __future__ import annotations

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


def _philox_words(elements: np.ndarray, seed: int, step: int, layer: int) -> np.ndarray:
    low = np.uint64(0xFFFFFFFF)
    elements = np.asarray(elements, dtype=np.uint64)
    block = elements // np.uint64(4)
    c = [block & low, block >> np.uint64(32), np.full_like(block, layer), np.full_like(block, step % 2**32)]
    k = [np.uint64(seed % 2**32), np.uint64(seed % 2**64 // 2**32)]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c)[(elements % np.uint64(4)).astype(np.int64), np.arange(len(elements))]


@pytest.fixture(scope="session")
def philox_words() -> Callable[[np.ndarray, int, int, int], np.ndarray]:
    """Oracle of the noise contract in NumPy: (elements, seed, step, layer) -> uint64 words below 2^32."""
    return _philox_words


@pytest.fixture(scope="session")
def noise() -> Callable[..., torch.Tensor]:
    """Oracle of u in fp64: noise(shape, seed, step, layer) -> ((word >> 8) + 0.5) * 2^-24 as fp32 rounds it."""

    def draw(shape: tuple[int, ...], seed: int, step: int = 0, layer: int = 0) -> torch.Tensor:
        words = _philox_words(np.arange(int(np.prod(shape))), seed, step, layer)
        exact = ((words >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24
        rounded = np.minimum(exact.astype(np.float32), np.float32(1 - 2.0**-24))
        return torch.from_numpy(rounded.astype(np.float64)).reshape(shape)

    return draw
