"""2:4 layers on a GPU: torch's own sparse tensors, with a stand-in for the two products that CUTLASS computes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

import dwm_fast as dwm
from dwm_fast.nn import SparseLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:dwm_fast. backend 'cuda' is not used"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor"),
]
N, K = 64, 128


@pytest.fixture
def vendor(gpu, monkeypatch):
    """The products of sparse tensor cores, in fp32 from the vendor's own format; returns the rows of x of each."""
    rows: list[int] = []

    def product(packed: Tensor, meta: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(x.shape[1])
        dense = sparse_semi_structured_to_dense_cutlass(packed, meta).float()
        y = dense @ x.float()
        return (y if bias is None else y + bias.float()[:, None]).to(packed.dtype)

    def add(bias: Tensor, packed: Tensor, meta: Tensor, x: Tensor) -> Tensor:
        return product(packed, meta, x, bias)

    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", add)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", lambda p, m, x: product(p, m, x, None))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", SparseSemiStructuredTensorCUTLASS.from_dense)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    return rows


def layers(bias: bool = True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(K, N, bias=bias, dtype=torch.bfloat16))
    masked = dwm.mask_model(net, dwm.Threshold()).eval()
    with torch.no_grad():
        first = masked.model[0].mask_logits.view(-1, 4).fill_(-1).random_(-9, 9).topk(2, 1).indices
        masked.model[0].mask_logits.fill_(-1).view(-1, 4).scatter_(1, first, 1.0)
    return masked, copy.deepcopy(masked).to("cuda:0")


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_run_on_sparse_cores_and_few_from_bits(vendor, bias):
    here, there = layers(bias)
    sparse, plain = dwm.pack(there), dwm.merge(here)[0]
    assert type(sparse[0]) is SparseLinear
    for rows, expected in ((64, []), (65, [72]), (200, [72, 200])):
        x = inputs(rows)
        with torch.no_grad():
            y = sparse(x.to("cuda:0").view(rows, 1, K))
        wide = F.linear(x.float(), plain.weight.float(), None if plain.bias is None else plain.bias.float())
        # one rounding of a sum to bf16, and fp32 sums in two orders
        torch.testing.assert_close(y.cpu().view(rows, N).float(), wide, rtol=2.0**-8, atol=K * 2.0**-22)
        assert vendor == expected
        told = dwm.explain(sparse[0], (rows, K)).forward
        assert told.way == ("sparse" if expected else "one-pass")
        if expected:
            assert f"{N * K * 2 * 9 // 16:,} bytes are held for it" in told.why
    assert torch.equal(dwm.merge(sparse)[0].weight.cpu(), plain.weight)


def test_what_was_made_is_made_anew_when_bits_or_weight_change(vendor):
    _, there = layers()
    sparse, x = dwm.pack(there), inputs(72).to("cuda:0")
    with torch.no_grad():
        sparse(x)
        held = sparse[0]._sparse
        sparse(x)
        assert sparse[0]._sparse is held
        sparse[0].bits.zero_()
        assert torch.equal(sparse(x).cpu(), sparse[0].bias.cpu().expand(72, N))
        sparse[0].bits.fill_(255)  # no longer 2:4: a packed layer
        before = len(vendor)
        dense = F.linear(x, sparse[0].backbone_weight, sparse[0].bias)
        assert torch.equal(sparse(x).cpu(), dense.cpu())
        assert len(vendor) == before
    assert "keep more than two" in dwm.explain(sparse[0], (72, K)).forward.why
    assert copy.deepcopy(sparse)[0]._sparse is None


@pytest.mark.parametrize("name", ["bits", "backbone_weight"])
def test_another_tensor_at_the_address_of_an_old_one_is_noticed(vendor, name):
    _, there = layers()
    sparse, x = dwm.pack(there), inputs(72).to("cuda:0")
    with torch.no_grad():
        sparse(x)
        old = getattr(sparse[0], name)
        old.data.zero_()  # as where memory was freed and given out again: address and version are the old ones
        alias = old.detach()
        setattr(sparse[0], name, nn.Parameter(alias, requires_grad=False) if name == "backbone_weight" else alias)
        assert torch.equal(sparse(x).cpu(), sparse[0].bias.cpu().expand(72, N))


def test_what_the_vendor_cannot_do_is_done_by_packed_layers(vendor, gpu, monkeypatch):
    _, there = layers()
    sparse, x = dwm.pack(there), inputs(72).to("cuda:0")

    def why() -> str:
        return dwm.explain(sparse[0], (72, K)).forward.why

    with dwm.use_way("staged"), torch.no_grad():
        sparse(x)
    assert sparse(x.clone().requires_grad_(True)).requires_grad
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "built without cuSPARSELt" in why()
    gpu.calls["get_device_capability"].side_effect = lambda device=None: (7, 5)
    assert "came with sm_80; this GPU is sm_75" in why()
    with torch.no_grad():
        sparse(x)
    assert vendor == []
    assert type(dwm.pack(there)[0]) is dwm.PackedLinear  # asked of this GPU, it is not chosen


def test_autocast_of_an_fp32_network_runs_there_and_plain_fp32_does_not(vendor):
    _, there = layers()
    sparse = dwm.pack(there.float(), values="2:4")
    x = inputs(72).to("cuda:0").float()
    with torch.no_grad():
        sparse(x)
        assert vendor == []
        with torch.autocast("cuda", dtype=torch.float16):
            assert sparse(x).dtype == torch.float16
    assert vendor == [72]


def test_a_graph_that_is_captured_too_early_reads_bits_and_a_later_one_runs_there(vendor):
    _, there = layers()
    sparse, x = dwm.pack(there), inputs(72).to("cuda:0")
    with torch.no_grad():
        with dwm.use_way("staged"):
            sparse(x)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            sparse(x)
        assert vendor == []
        sparse(x)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            sparse(x)
    assert vendor == [72, 72]
