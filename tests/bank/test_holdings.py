"""`MaskBank.explain`: what is held of each domain, counted by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dwm_fast import MaskBank

SIDE = 2048
"""Of a weight whose few rows are multiplied straight: 2^22 elements."""


def _masks(kept: float, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"0.weight": torch.rand(SIDE, SIDE, generator=generator) < kept, "1.weight": torch.rand(4, SIDE) < 0.5}


def test_domains_are_cold_then_warm_then_hot_with_the_bytes_of_their_tensors(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 4))
    made = MaskBank(net)
    made.add("few", _masks(0.2, 0), state={"1.bias": torch.zeros(4)})
    made.add("most", _masks(0.9, 1))
    made.save(tmp_path)
    bits = (SIDE * SIDE + 4 * SIDE) // 8
    bank = MaskBank.load(tmp_path, net)
    assert [one.state for one in bank.explain().domains] == ["cold", "cold"]
    bank.record("few")
    few, most = bank.explain().domains
    assert (few.state, few.stored_nbytes, few.ready_nbytes) == ("warm", bits + 16, 0)
    assert (most.state, most.stored_nbytes) == ("cold", 0)
    for name in ("few", "most"):
        bank.activate(name)
        bank(torch.ones(1, SIDE))
    few, most = found = bank.explain().domains
    assert [one.state for one in found] == ["hot", "hot"]
    weights = 4 * (SIDE * SIDE + 4 * SIDE)
    assert most.ready_nbytes >= weights + SIDE * SIDE // 8
    assert most.from_bits == ("0.weight",)
    assert most.from_kept == ()
    values = 4 * int(_masks(0.2, 0)["0.weight"].sum())
    assert few.ready_nbytes >= weights + SIDE * SIDE // 8 + values
    assert few.from_kept == ("0.weight",)
    assert sum(one.ready_nbytes + one.stored_nbytes for one in found) == bank.explain().hot_nbytes
    said = str(bank.explain())
    assert f"few (binary): hot, {bits + 16:,} bytes stored" in said
    assert "few rows from kept weights: 0.weight" in said
    assert f"at most {1 << 30:,}" in said


def test_what_was_in_memory_from_the_start_is_not_counted_against_the_budget() -> None:
    bank = MaskBank(nn.Linear(8, 8))
    bank.add("a", {"weight": torch.rand(8, 8) < 0.5})
    (one,) = bank.explain().domains
    assert (one.state, one.stored_nbytes, bank.explain().hot_nbytes) == ("warm", 16, 0)
