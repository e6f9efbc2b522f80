"""KeptLinear: a packed layer of kept weights is the packed layer, in fewer bytes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.nn import KeptLinear


@pytest.fixture(params=["reference", None], ids=["reference", "default"], autouse=True)
def _backend(request):
    with dwm.use_backend(request.param):
        yield


def masked(seed: int = 0, dtype: torch.dtype = torch.float32) -> dwm.MaskedModel:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(37, 50), nn.ReLU(), nn.Linear(50, 9, bias=False)).to(dtype)
    result = dwm.mask_model(plain, dwm.Threshold(), seed=1).eval()
    with torch.no_grad():
        for p in result.mask_parameters():
            p.normal_(generator=torch.Generator().manual_seed(seed + p.numel()))
    return result


X = torch.randn(3, 37, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_computes_what_the_packed_network_computes(dtype):
    model = masked(dtype=dtype)
    kept, packed, x = dwm.pack(model, values="kept"), dwm.pack(model, values="all"), X.to(dtype)
    assert [type(m).__name__ for m in (kept[0], packed[0])] == ["KeptLinear", "PackedLinear"]
    assert isinstance(kept[0], dwm.PackedLinear)
    with dwm.use_way("staged"):
        assert torch.equal(kept(x), packed(x))
    if dtype == torch.float32:
        assert torch.equal(kept(x), packed(x))  # in one pass too, where the extension computes
    for a, b in ((kept[0], packed[0]), (kept[2], packed[2])):
        assert torch.equal(a.weight, b.weight)
        assert a.weight.dtype == dtype


def test_bytes_are_those_of_the_kept_weights_and_the_bits():
    layer = dwm.pack(masked(), values="kept")[0]
    ones = int(ops.count(layer.bits, [37 * 50])[0])
    assert layer.nbytes == 4 * (ones + ops.PADDING) + ops.packed_nbytes(37 * 50) + 8 * 51
    assert f"kept={ones / (37 * 50):.3f}, bytes={layer.nbytes:,}" in repr(layer)
    assert sorted(layer.state_dict()) == ["bias", "bits", "row_starts", "values"]
    assert not any(p.requires_grad for p in layer.parameters())


def test_what_lies_under_a_dropped_bit_never_leaks():
    model = masked()
    keep = model.keep_masks()["0"]
    with torch.no_grad():
        model.model[0].weight[~keep] = torch.nan
    kept = dwm.pack(model, values="kept")
    assert torch.isfinite(kept(X)).all()
    assert torch.isfinite(kept[0].weight).all()


def test_merge_gives_the_masked_weights_back_exactly():
    model = masked()
    for values in ("kept", "all"):
        plain = dwm.merge(dwm.pack(model, values=values))
        expected = dwm.merge(model)
        assert [type(m) for m in plain] == [nn.Linear, nn.ReLU, nn.Linear]
        assert sorted(plain.state_dict()) == sorted(expected.state_dict())
        assert all(torch.equal(v, expected.state_dict()[k]) for k, v in plain.state_dict().items())
        assert all(p.requires_grad for p in plain.parameters())


def test_state_dicts_files_copies_and_moves_keep_it(tmp_path):
    kept, other = dwm.pack(masked(), values="kept"), dwm.pack(masked(5), values="kept")
    assert kept[0].values.shape != other[0].values.shape
    safetensors.torch.save_file(kept.state_dict(), tmp_path / "kept.safetensors")
    for state in (kept.state_dict(), safetensors.torch.load_file(tmp_path / "kept.safetensors")):
        fresh = copy.deepcopy(other)
        fresh.load_state_dict(state)
        assert torch.equal(fresh(X), kept(X))
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(kept)), copy.deepcopy(kept)):
        assert torch.equal(twin(X), kept(X))
    half = copy.deepcopy(kept).to(torch.bfloat16)
    assert half[0].row_starts.dtype == torch.int64
    assert half[0].values.numel() == kept[0].values.numel()
    assert torch.equal(half[0].weight, kept[0].weight.bfloat16())
    assert half(X.bfloat16()).dtype == torch.bfloat16


def test_a_state_whose_parts_do_not_fit_is_refused_before_anything_changes():
    kept, other = dwm.pack(masked(), values="kept"), dwm.pack(masked(5), values="kept")
    before = kept(X)
    for name in ("values", "row_starts", "bits"):
        state = kept.state_dict()
        state[f"0.{name}"] = other.state_dict()[f"0.{name}"]
        with pytest.raises(InputError, match=r"state of '0' has .* give the state of one packed layer"):
            kept.load_state_dict(state)
        assert torch.equal(kept(X), before)
    with pytest.raises(RuntimeError, match="size mismatch"):
        kept.load_state_dict({**kept.state_dict(), "0.bits": torch.zeros(16, dtype=torch.uint8)})


def test_it_compiles_in_one_graph_follows_autocast_and_hands_gradients_to_its_input():
    model = masked()
    kept, packed = dwm.pack(model, values="kept"), dwm.pack(model, values="all")
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), kept(X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = kept(X), packed(X)
    assert y.dtype == torch.bfloat16
    # Kept weights are multiplied unrounded, packed ones rounded to 8 bits: a few units in the last place apart.
    torch.testing.assert_close(y, expected, rtol=4 * 2.0**-8, atol=4 * 2.0**-8 * float(expected.abs().max()))
    x, twin = X.clone().requires_grad_(True), X.clone().requires_grad_(True)
    kept(x).square().sum().backward()
    packed(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    with torch.inference_mode():
        kept(X)
    dwm.pack(model, values="kept")(X.clone().requires_grad_(True)).sum().backward()


def test_it_says_which_way_runs_and_in_how_many_bytes():
    layer = dwm.pack(masked(), values="kept")[0]
    told = dwm.explain(layer, (3, 37))
    assert told.forward.way == ("one-pass" if ops.backends.chosen("linear_kept", "cpu") == "cpp" else "staged")
    assert f"holds {layer.nbytes:,} bytes, {4 * 37 * 50:,} where all weights are stored" in told.forward.why
    assert dwm.explain(layer, (300, 37)).forward.way == "staged"
    assert "frozen" in told.mask_gradient.why
    with pytest.raises(InputError, match=r"expected \(\.\.\., 37\)"):
        dwm.explain(layer, (3, 36))


def test_it_is_chosen_by_itself_where_it_wins_and_an_unknown_choice_is_named():
    model = masked()
    assert type(dwm.pack(model)[0]) is dwm.PackedLinear  # too small to win
    big = dwm.mask_model(nn.Linear(2048, 2048, bias=False), dwm.Threshold()).eval()
    with torch.no_grad():
        big.model.mask_logits.fill_(-1)[:900] = 1
    assert type(dwm.pack(big)) is KeptLinear
    assert type(dwm.pack(big, values="all")) is dwm.PackedLinear
    with torch.no_grad():
        big.model.mask_logits[:1100] = 1
    assert type(dwm.pack(big)) is dwm.PackedLinear
    with pytest.raises(InputError, match="pack got values='some'; expected one of auto, kept, 2:4, all"):
        dwm.pack(model, values="some")
