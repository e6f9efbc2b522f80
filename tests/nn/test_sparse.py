"""Packed layers of 2:4 masks: which ones are, why others are not, and that on a CPU they are packed layers."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast import ops
from dwm_fast.nn import SparseLinear
from dwm_fast.ops.two_of_four import keeps_two_of_four, obstacle_of_device, obstacle_of_weight


def masked(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dwm.MaskedModel:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48, bias=False)).to(dtype)
    torch.manual_seed(seed)
    return dwm.mask_model(plain, dwm.SemiStructured(2, 4, spread=0.1)).eval()


def x(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(100, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def test_every_group_of_four_decides_for_itself():
    shape = (2, 8)
    for places in itertools.product((False, True), repeat=4):
        for where in range(4):
            mask = torch.tensor([True, False, True, False] * 4)
            mask[4 * where : 4 * where + 4] = torch.tensor(places)
            assert keeps_two_of_four(ops.pack([mask]), shape) is (sum(places) <= 2), places
    assert not keeps_two_of_four(ops.pack([torch.zeros(12, dtype=torch.bool)]), (2, 6))  # a group of two rows
    assert not keeps_two_of_four(ops.pack([torch.zeros(16, dtype=torch.bool)]), (2, 2, 4))


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((16, 16), torch.float16, ""),
        ((48, 80), torch.bfloat16, ""),
        ((48, 80), torch.float32, "not in torch.float32"),
        ((40, 80), torch.bfloat16, r"whole blocks of 16 x 16, not (40, 80)"),
        ((48, 72), torch.bfloat16, r"not (48, 72)"),
        ((0, 16), torch.bfloat16, r"not (0, 16)"),
        ((16, 16, 1, 1), torch.bfloat16, "whole blocks"),
    ],
)
def test_the_vendors_limits_are_said(shape, dtype, expected):
    found = obstacle_of_weight(shape, dtype)
    assert (found == "") if not expected else (expected in found)


def test_a_processor_has_none():
    assert obstacle_of_device(torch.device("cpu")) == "there are no sparse tensor cores on cpu"


def test_asked_for_they_are_made_anywhere_and_compute_as_packed_layers_on_a_cpu():
    model = masked()
    sparse, packed = dwm.pack(model, values="2:4"), dwm.pack(model, values="all")
    assert [type(m) for m in sparse] == [SparseLinear, nn.ReLU, SparseLinear]
    assert [type(m) for m in dwm.pack(model)] == [dwm.PackedLinear, nn.ReLU, dwm.PackedLinear]  # nothing to gain here
    assert torch.equal(sparse(x()), packed(x()))
    assert sparse[0].backbone_weight.data_ptr() == model.model[0].weight.data_ptr()
    told = dwm.explain(sparse[0], (100, 64)).forward
    assert told.way == "staged"
    assert told.why.endswith("; not on sparse tensor cores: there are no sparse tensor cores on cpu")
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x()), packed(x()))
    wanted = x().requires_grad_(True)
    sparse(wanted).sum().backward()
    assert wanted.grad is not None


def test_states_files_copies_and_merge_are_those_of_packed_layers(tmp_path):
    model = masked()
    sparse, packed, other = (
        dwm.pack(m, values=v) for m, v in ((model, "2:4"), (model, "all"), (masked(seed=3), "2:4"))
    )
    states = [net.state_dict() for net in (sparse, packed)]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    safetensors.torch.save_file(states[0], tmp_path / "sparse.safetensors")
    assert not torch.equal(other(x()), packed(x()))
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "sparse.safetensors"))
    for twin in (other, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert type(twin[0]) is SparseLinear
        assert torch.equal(twin(x()), packed(x()))
    plain, expected = dwm.merge(sparse), dwm.merge(model)
    assert [type(m) for m in plain] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in plain.state_dict().items())
    assert not {"_sparse", "not_sparse"} & set(vars(plain[0]))


def test_a_mask_or_a_shape_that_does_not_fit_stays_packed_and_explain_says_why():
    torch.manual_seed(0)
    net = dwm.mask_model(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 20)), dwm.Threshold()).eval()
    packed = dwm.pack(net, values="2:4")
    assert [type(m) for m in packed] == [dwm.PackedLinear] * 2
    reasons = [dwm.explain(layer, (100, layer.in_features)).forward.why for layer in packed]
    assert reasons[0].endswith("not on sparse tensor cores: some four neighbours of the mask keep more than two")
    assert reasons[1].endswith("not on sparse tensor cores: they take weights of whole blocks of 16 x 16, not (20, 32)")
    assert "sparse" not in dwm.explain(dwm.pack(net)[0], (100, 64)).forward.why


@pytest.mark.gpu
def test_many_rows_run_on_a_gpus_sparse_tensor_cores():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 128, dtype=torch.bfloat16, device="cuda"))
    net = dwm.mask_model(plain, dwm.SemiStructured(2, 4, spread=0.1)).eval()
    packed, dense = dwm.pack(net), dwm.merge(net)[0]
    rows = torch.randn(200, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = packed(rows)
    assert packed[0]._sparse is not None
    assert dwm.explain(packed[0], rows.shape).forward.way == "sparse"
    exact = rows.double() @ dense.weight.double().T + dense.bias.double()
    size = rows.double().abs() @ dense.weight.double().abs().T + dense.bias.double().abs()
    # 257 terms summed in fp32, in any order; bf16 roundings of the product and, where the bias comes after, of the sum.
    rounded = 2.0**-8 * (2 * exact.abs() + dense.bias.double().abs())
    assert ((y.double() - exact).abs() <= 1.01 * (rounded + 257 * 2.0**-24 * size)).all()
