"""The noise contract: words, uniforms and the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dwm_fast import ops
from dwm_fast.ops import philox

pytestmark = pytest.mark.usefixtures("reference", "poison")

# Random123's kat_vectors, lines "philox4x32 10": counter, key, expected.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _state(seed: int, step: int) -> torch.Tensor:
    return torch.tensor([seed, step], dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    c, k, e = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    words = philox.philox4x32(
        tuple(torch.tensor(v, dtype=torch.int64) for v in c),
        tuple(torch.tensor(v, dtype=torch.int64) for v in k),
    )
    assert [int(w) for w in words] == e


def test_the_first_words_of_seed_zero_are_the_published_ones(oracle):
    published = [int(word, 16) for word in KNOWN_ANSWERS[0][2].split()]
    assert ops.random_words(4, _state(0, 0), 0).tolist() == published
    assert oracle.words(np.arange(4), 0, 0, 0).tolist() == published


SEEDS = [0, 5, 2**32 + 7, 2**63 - 1, -1, -(2**63), -(2**40) - 3]
STEPS = [0, 1, 2**32 - 1, 2**32 + 3, 2**45 + 17]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", STEPS)
def test_words_equal_the_numpy_oracle_for_every_seed_step_and_layer(oracle, seed, step):
    for layer in (0, 3, 2**32 - 1):
        words = ops.random_words(39, _state(seed, step), layer)
        assert words.tolist() == oracle.words(np.arange(39), seed, step, layer).tolist()


@pytest.mark.parametrize("numel", [0, 1, 2, 3, 4, 5, 4 * (1 << 15) - 1, 4 * (1 << 15) + 5])
def test_any_number_of_elements_over_chunk_borders(oracle, numel):
    words = ops.random_words(numel, _state(11, 2), 1)
    assert words.shape == (numel,)
    assert np.array_equal(words.numpy().astype(np.uint64), oracle.words(np.arange(numel), 11, 2, 1))


@pytest.mark.parametrize("element", [2**34 - 4, 2**34, 2**34 + 40, 2**40 + 8])
def test_elements_beyond_2_34_use_the_high_counter_word(oracle, element):
    elements = np.arange(element, element + 8, dtype=np.uint64)
    block = torch.tensor([element // 4, element // 4 + 1])
    words = philox.block_words(block, _state(9, 4), 2)
    assert words.flatten().tolist() == oracle.words(elements, 9, 4, 2).tolist()


@pytest.mark.parametrize(("step", "offset"), [(0, 3), (2**32 - 2, 5)])
def test_step_offset_is_added_to_the_step_and_wraps_at_32_bits(step, offset):
    shifted = ops.random_words(64, _state(3, step), 0, step_offset=offset)
    assert torch.equal(shifted, ops.random_words(64, _state(3, (step + offset) % 2**32), 0))


def test_seed_step_and_layer_each_change_the_words():
    draws = [
        ops.random_words(256, _state(seed, step), layer)
        for seed, step, layer in [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for i, a in enumerate(draws):
        assert all((a != b).float().mean() > 0.99 for b in draws[:i])


def test_uniform_is_the_contract_formula_for_every_24_bit_value(oracle):
    words = np.arange(2**24, dtype=np.int64) << 8 | 0xAB
    u = ops.uniform(torch.from_numpy(words)).numpy()
    assert u.dtype == np.float32
    expected = oracle.uniform_of(words).astype(np.float32)
    assert np.array_equal(u[:-1], expected[:-1])
    assert expected[-1] == 1
    assert u[-1] == np.float32(1 - 2.0**-24)  # 1 is kept out
    assert u[0] == (0xAB + 0.5) * 2.0**-32


def test_advance_returns_the_state_of_the_draw_and_moves_on_in_place():
    state = _state(7, 2**32 - 1)
    drawn = ops.advance(state, 4)
    assert drawn.tolist() == [7, 2**32 - 1]
    assert state.tolist() == [7, 2**32 + 3]
    assert drawn.data_ptr() != state.data_ptr()
    assert ops.advance(state).tolist() == [7, 2**32 + 3]
    assert state[1] == 2**32 + 4


def test_advance_is_a_well_formed_operation():
    torch.library.opcheck(torch.ops.dwm_fast.advance.default, (_state(1, 2), 3))
