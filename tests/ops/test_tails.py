"""Rare events: drawn as often as their probability says, over all words that decide one; ordinary masks as ever."""

from __future__ import annotations

import math

import pytest
import torch

import dwm_fast
from dwm_fast.ops import Mode, random_words
from dwm_fast.ops.philox import signed_uniform
from dwm_fast.ops.sample import hard, noisy

TAILS = torch.cat([torch.arange(2**16), torch.arange(2**32 - 2**16, 2**32)])
"""Every word that decides an event rarer than 2^-16: below it all, above it none of the others."""


def _logit(p: float) -> torch.Tensor:
    return torch.tensor(math.log(p / (1 - p)))


def _counts(p: float) -> tuple[int, int]:
    """Of all 2^32 words, how many keep a weight that is kept with probability p, and drop one that is dropped so."""
    u = signed_uniform(TAILS)
    return int(hard(_logit(p).expand_as(u), u).sum()), int((~hard(-_logit(p).expand_as(u), u)).sum())


@pytest.mark.parametrize("p", [1.5e-5, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9])
def test_a_rare_event_is_drawn_as_often_as_its_probability_says(p):
    # A half for the last word; less than a half (2^32 p^2 at 1e-5, one at 1.5e-5) as e^l stands for sigmoid(l);
    # a fp32 logit and its exponential are good to 2^-19 of at most 2^16 words.
    allowed = 0.5 + 2**32 * p**2 + 2**13 * p
    for count in _counts(p):
        assert abs(count - p * 2**32) <= allowed


@pytest.mark.parametrize("side", [1, -1])
def test_words_outside_the_tails_decide_no_rare_event(side):
    beside = torch.tensor([2**16, 2**16 + 1, 2**17, 2**31, 2**32 - 2**17, 2**32 - 2**16 - 2, 2**32 - 2**16 - 1])
    logit = (side * _logit(1.5e-5)).expand(beside.shape)
    assert torch.equal(hard(logit, signed_uniform(beside)), torch.full(beside.shape, side < 0))


def test_the_least_probability_that_is_drawn_is_half_a_step():
    assert _counts(1.01 * 2.0**-33) == (1, 1)
    assert _counts(0.99 * 2.0**-33) == (0, 0)


def _former_mask(logits, words):
    """The contract before tails were refined: 24 bits everywhere."""
    u = ((words >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25).clamp_(max=1 - 2.0**-24)
    return u > 1 / (1 + torch.exp(logits))


def test_masks_of_ordinary_logits_are_the_former_ones_bit_for_bit():
    generator = torch.Generator().manual_seed(5)
    words = torch.cat([torch.randint(2**32, (10**6,), generator=generator), TAILS.repeat(8)])
    logits = torch.rand(len(words), generator=generator) * 20 - 10
    assert torch.equal(hard(logits, signed_uniform(words)), _former_mask(logits, words))


@pytest.mark.parametrize("logit", [-18.0, -12.0, -3.0, 0.0, 3.0, 12.0, 18.0])
def test_the_soft_mask_of_the_tails_is_the_formula_and_agrees_with_the_hard_one(logit):
    u = signed_uniform(TAILS)
    exact = (TAILS.double() + 0.5) * 2.0**-32
    argument = logit + exact.log() - torch.log1p(-exact)
    found = noisy(torch.full(u.shape, logit), u)
    torch.testing.assert_close(found.double(), argument, rtol=0, atol=3 * 32 * 2.0**-24)  # three terms of at most 32
    clear = argument.abs() > 2.0**-16  # e^l for sigmoid(l), and as above
    assert torch.equal(hard(torch.full(u.shape, logit), u)[clear], (argument > 0)[clear])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_rare_events_of_a_draw_are_the_contracts(oracle, backend):
    n, seed, step = 2**22, 12, 3
    state, tau = torch.tensor([seed, step]), torch.tensor(1.0)
    words = random_words(n, state, 0)
    logits = torch.tensor([-11.5, 11.5, -14.0, 14.0]).repeat(n // 4)
    ones, one = torch.ones(n), torch.ones(())
    u = torch.from_numpy(oracle.uniform_of(words.numpy()))
    rare = (u < 2.0**-16) | (u > 1 - 2.0**-16)
    assert 80 < int(rare.sum()) < 180  # 128 +- 11
    draw = (state, tau, [0], [0.0])
    with dwm_fast.use_backend(backend):
        (hard_mask,), _, _ = torch.ops.dwm_fast.sample([logits], [ones], *draw, int(Mode.GUMBEL_HARD), 0, None, False)
        (soft_mask,), _, _ = torch.ops.dwm_fast.sample([logits], [ones], *draw, int(Mode.GUMBEL_SOFT), 0, None, False)
        (slope,), (kept,) = torch.ops.dwm_fast.sample_backward(
            [ones], 0 * one, [logits], [ones], *draw, int(Mode.GUMBEL_HARD), 0, True, True
        )
    argument = logits.double() + u.log() - torch.log1p(-u)
    assert torch.equal(hard_mask.bool(), argument > 0)
    assert int((hard_mask.bool() != (logits > 0)).sum()) > 20  # events that did happen
    assert torch.equal(kept, hard_mask)
    soft = torch.sigmoid(argument)
    # log u and the argument are rounded by 2^-20 where they are below 32; a sigmoid carries that over as it is
    torch.testing.assert_close(soft_mask.double(), soft, rtol=2.0**-18, atol=0)
    torch.testing.assert_close(slope.double(), soft * torch.sigmoid(-argument), rtol=2.0**-18, atol=0)
