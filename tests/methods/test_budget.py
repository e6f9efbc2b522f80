"""The source budget's controller: up within the budget, down beyond it, on the device."""

import math

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.methods import SourceBudget


def run(control, *excess):
    """Coefficients after each of the measurements."""
    return [float(control.update(torch.tensor(x))) for x in excess]


def test_rises_while_the_excess_is_within_the_budget():
    control = SourceBudget(0.1)
    found = [float(control.coefficient), *run(control, *[0.02] * 20)]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_falls_at_once_beyond_the_budget_and_further_while_it_lasts():
    control = SourceBudget(0.1)
    run(control, *[0.0] * 10)
    before = float(control.coefficient)
    found = run(control, *[0.5] * 10)
    assert found[0] < before
    assert found == sorted(found, reverse=True)


def test_stands_still_at_the_budget():
    control = SourceBudget(0.1, smoothing=1.0)
    assert run(control, 0.1, 0.1, 0.1) == pytest.approx([float(control.coefficient)] * 3)


def test_settles_where_the_excess_meets_the_budget():
    """A plant whose excess grows with the coefficient, answering late: excess -> coefficient / 1000."""
    control, excess = SourceBudget(0.05), 0.0
    for _ in range(1200):
        excess += 0.2 * (float(control.coefficient) / 1000 - excess)
        control.update(torch.tensor(excess))
    assert excess == pytest.approx(0.05, rel=0.1)


def test_a_mask_that_helps_does_not_raise_faster_than_a_full_slack():
    free, helped = SourceBudget(0.1), SourceBudget(0.1)
    assert run(free, 0.0, 0.0) == run(helped, -5.0, -5.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_counts_as_the_running_mean(bad):
    one, other = SourceBudget(0.1), SourceBudget(0.1)
    run(one, 0.03)
    run(other, 0.03)
    assert run(one, bad) == run(other, float(other.excess))
    assert math.isfinite(float(one.coefficient))


def test_stays_within_bounds_and_comes_back():
    control = SourceBudget(0.1)
    low = run(control, *[100.0] * 1000)
    assert low[-1] == low[-2] > 0
    assert run(control, *[0.0] * 50)[-1] > low[-1]


def test_coefficient_is_changed_in_place():
    control = SourceBudget(0.1)
    tensor, address = control.coefficient, control.coefficient.data_ptr()
    returned = control.update(torch.tensor(0.0))
    assert returned is tensor
    assert control.coefficient is tensor
    assert tensor.data_ptr() == address
    assert tensor.dtype == torch.float32


def test_no_value_is_read_from_the_device():
    control = SourceBudget(0.1, device="meta")  # tensors without values: reading one is an error
    control.update(torch.empty((), device="meta"))


@pytest.mark.gpu
def test_gpu_never_waits():
    control = SourceBudget(0.1, device="cuda")
    excess = torch.tensor(0.02, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        control.update(excess)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert control.coefficient.is_cuda


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(InputError, match=r"source_budget is .*above 0, in nats"):
        SourceBudget(budget)
