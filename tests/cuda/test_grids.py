"""Grids fit what a GPU takes, whatever the batch: 2**31 - 1 blocks in the first axis, 65,535 in the others."""

from __future__ import annotations

import pytest
import torch

from dwm_fast import ops
from dwm_fast.kernels import bank

from . import launches

pytestmark = pytest.mark.filterwarnings("ignore:dwm_fast. backend 'cuda' is not used")


@pytest.mark.parametrize("domains", [1, 3])
def test_a_bank_product_of_more_row_tiles_than_a_second_axis_takes(gpu, monkeypatch, domains):
    monkeypatch.setattr(launches, "interpret", lambda *args, **options: None)
    rows = 65_536 * bank.MANY.block_m
    weight = torch.ones(1, 1, device="cuda:0")
    bits = torch.zeros(domains, 16, dtype=torch.uint8, device="cuda:0")
    offsets = torch.tensor([0] + [rows] * domains, device="cuda:0")
    ops.bank_linear(torch.ones(rows, 1).to("cuda:0"), weight, bits, None, offsets, rows)
    (found,) = [x for x in gpu.launches if x.kernel.startswith("bank")]
    assert found.kernel == "bank_linear_many_fwd_kernel"
    assert found.grid == (65_536 + domains - 1,)


def test_a_grid_that_no_gpu_takes_is_found_out(gpu):
    bits = torch.zeros(3, 16, dtype=torch.uint8, device="cuda:0")
    with pytest.raises(AssertionError, match="grid"):
        bank.bank_linear_few_fwd_kernel[(1, 65_536)](bits)
