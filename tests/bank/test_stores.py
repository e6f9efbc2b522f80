"""Kept weights in mixed batches: chosen by their bytes, the same bits, shown by `explain`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dwm_fast as dwm
from dwm_fast import MaskBank, ops

SIDE = 2048
"""Of a weight whose few rows are multiplied straight: 2^22 elements."""
NAMES = ("a", "b")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(SIDE, SIDE)
        self.head = nn.Linear(SIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.large(x)))


def bank_of(shared: float, own: float, budget: int = 1 << 30, domains: int = 2) -> MaskBank:
    """Domains that have a share of the weights in common, and one each for itself."""
    torch.manual_seed(0)
    net = Net().eval()
    bank = MaskBank(net, memory_budget=budget)
    place = torch.rand(SIDE, SIDE)
    for i, name in enumerate("abcdef"[:domains]):
        from_ = shared + i * own
        mask = (place < shared) | ((place >= from_) & (place < from_ + own))
        bank.add(name, {"large.weight": mask}, state={"large.bias": torch.randn(SIDE)} if i else None)
    return bank


def mixed(bank: MaskBank, rows: int = 3) -> tuple[Tensor, Tensor]:
    """A mixed batch, and what a bank without stores gives for it."""
    x, domains = torch.randn(2 * rows, SIDE), ["b", "a"] * rows
    with torch.no_grad():
        found = bank(x, domains=domains)
        twin = bank.serve(NAMES)._twin
        layer = vars(twin.get_submodule("large"))["forward"]
        kept, layer.store = layer.store, None
        plain = bank(x, domains=domains)
        layer.store = kept
    return found, plain


@pytest.mark.parametrize(
    ("shared", "own", "form"), [(0.25, 0.05, "union"), (0.05, 0.2, "separate"), (0.5, 0.05, "dense")]
)
def test_the_smallest_store_serves_a_mixed_batch_with_the_same_bits(shared, own, form):
    bank = bank_of(shared, own)
    found, plain = mixed(bank)
    assert torch.equal(found, plain)
    (served,) = bank.explain().served
    kept = [int(mask["large.weight"].sum()) for mask in map(bank.masks, NAMES)]
    union = int(bank.union(list(NAMES))["large.weight"].sum())
    if form == "dense":
        assert not served.stores
        return
    store = served.stores["large.weight"]
    assert store.form == form
    counted = [union] if form == "union" else kept
    assert store.nbytes == sum(4 * (count + ops.PADDING) + 8 * (SIDE + 1) for count in counted)
    assert served.nbytes >= store.nbytes + 2 * SIDE * SIDE // 8
    bits = 2 * SIDE * SIDE // 8
    said = str(bank.explain())
    assert f"{4 * SIDE * SIDE + bits:,} of all weights, {4 * sum(kept) + bits:,} of each domain's, " in said
    assert f"{4 * union + bits:,} of the union" in said
    for name in NAMES:  # and what an activated domain gives
        bank.activate(name)
        x = torch.randn(2, SIDE)
        with torch.no_grad():
            assert torch.equal(bank(x), bank(torch.cat([x, x]), domains=[name] * 2 + ["a", "b"])[:2])


def test_a_store_serves_few_rows_without_gradients_and_only_where_a_kernel_reads_it(monkeypatch):
    bank = bank_of(0.25, 0.05)
    used = []
    real = ops.bank_linear_union
    monkeypatch.setattr(ops, "bank_linear_union", lambda *args: used.append(len(args[0])) or real(*args))
    found, plain = mixed(bank, rows=40)
    assert torch.equal(found, plain)
    assert used == []
    x = torch.randn(2, SIDE, requires_grad=True)
    bank(x, domains=["a", "b"]).sum().backward()
    assert x.grad is not None
    with dwm.use_backend("reference"), torch.no_grad():
        bank(x, domains=["a", "b"])
    assert used == []
    with torch.no_grad():
        bank(x, domains=["a", "b"])
    assert used == [2]


def test_none_is_made_without_room_or_where_a_domain_has_no_mask():
    small = bank_of(0.25, 0.05, budget=8 << 20)
    found, plain = mixed(small)
    assert torch.equal(found, plain)
    assert not small.serve(NAMES).stores
    bank = bank_of(0.25, 0.05)
    bank.add("bare", {"head.weight": torch.rand(3, SIDE) < 0.5})
    assert not bank.serve(["a", "bare"]).stores
