"""A mask on any module's parameter: its code runs as it is, over the weights that a naive reference would give it.

The naive reference of every test is the plain network whose parameters are multiplied by the keep masks, one by one.
Parameters are compared bit for bit. Outputs are compared within torch's default bounds (1e-5 near 1): MKL adds up in an
order that depends on where a matrix lies, and attention has another kernel where something learns. A mask bit that is
wrong moves an output by 1e-2 and more.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.nn.hosts import MaskedParameter

from .host_nets import NETS, Conv1D, Experts, First, Tied

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*enable_nested_tensor.*"),
    pytest.mark.filterwarnings("ignore:LSTM with projections.*"),
]
SORTS = pytest.mark.parametrize("sort", NETS)


def _made(sort: str, seed: int = 0) -> tuple[nn.Module, Tensor, dict[str, Any], set[str]]:
    torch.manual_seed(seed)
    make, rows, options, names = NETS[sort]
    return make().eval(), rows(), options, names


def _masked(net: nn.Module, options: Mapping[str, Any], seed: int = 1) -> dwm.MaskedModel:
    """In eval(), with logits of both signs."""
    masked = dwm.mask_model(net, dwm.GumbelSigmoid(init=0.0), seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for logits in masked.mask_parameters():
            logits.copy_(torch.randn(logits.shape, generator=generator))
    return masked.eval()


def _full_name(net: nn.Module, name: str) -> str:
    """The parameter that the mask called `name` is on."""
    return name if name in dict(net.named_parameters()) else f"{name}.weight".lstrip(".")


def _naive(net: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """The plain network with the masks multiplied in, by plain assignment."""
    plain = copy.deepcopy(net)
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, mask in keep.items():
            parameters[_full_name(net, name)].mul_(mask)
    return plain


def _same_modules(a: nn.Module, b: nn.Module) -> bool:
    return [(n, type(m)) for n, m in a.named_modules()] == [(n, type(m)) for n, m in b.named_modules()]


# --- what is computed


@SORTS
def test_the_network_computes_what_it_would_over_masked_weights(sort: str) -> None:
    net, x, options, names = _made(sort)
    before = copy.deepcopy(net.state_dict())
    masked = _masked(net, options)
    assert set(masked.mask_layers()) == names
    torch.testing.assert_close(masked(x), _naive(net, masked.keep_masks())(x))
    assert (masked(x) - net(x)).abs().max() > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    addresses = {p.data_ptr() for p in net.parameters()}
    assert all(layer.frozen_weight.data_ptr() in addresses for layer in masked.mask_layers().values())


@SORTS
def test_a_training_call_is_the_plain_network_under_the_drawn_weights_and_reaches_every_mask(sort: str) -> None:
    net, x, options, _ = _made(sort)
    masked = _masked(net, options).train()
    layers = masked.mask_layers()
    drawn, _, _ = dwm.ops.sample(
        [layer.mask_logits for layer in layers.values()],
        [layer.frozen_weight for layer in layers.values()],
        masked.rng_state.clone(),
        masked.tau,
        mode=masked.kind.training_mode,
        thresholds=[layer.unit for layer in layers.values()],
    )
    plain = copy.deepcopy(net).train()
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in zip(layers, drawn, strict=True):
            parameters[_full_name(net, name)].copy_(weight)
    found, expected = masked(x), plain(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in layers.items():
        assert layer.frozen_weight.grad is None
        assert layer.mask_logits.grad is not None
        # the straight-through rule, METHODS section 1: dl = W * dW * y (1 - y) / tau is 0 only where dW or W is
        slope = parameters[_full_name(net, name)].grad * layer.frozen_weight
        reached = slope.abs() > 1e-4 * slope.abs().max()
        assert (layer.mask_logits.grad[reached] != 0).float().mean() > 0.9


@pytest.mark.parametrize("sort", ["LSTM", "attention", "Conv1D", "experts", "tied"])
def test_mask_adam_learns_the_masks_and_leaves_the_weights(sort: str) -> None:
    net, x, options, _ = _made(sort)
    masked = _masked(net, options).train()
    before = [logits.detach().clone() for logits in masked.mask_parameters()]
    weights = copy.deepcopy(net.state_dict())
    optimizer = dwm.optim.MaskAdam(masked, lr=0.1, coefficient=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (masked(x).square().mean() + masked.sparsity_penalty()).backward()
        optimizer.step()
    assert all((a != b).any() for a, b in zip(before, masked.mask_parameters(), strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("sort", ["Conv1D", "experts", "attention", "Conv1d", "embedding"])
def test_a_compiled_network_computes_the_same(sort: str) -> None:
    net, x, options, _ = _made(sort)
    masked = _masked(net, options)
    compiled = torch.compile(masked, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), masked(x))
    torch.testing.assert_close(torch.compile(dwm.pack(masked), backend="eager", fullgraph=True)(x), masked(x))


def test_several_masks_a_batch_reach_hosts_too() -> None:
    net, x, _, _ = _made("LSTM")
    masked = dwm.mask_model(net, dwm.GumbelSigmoid(init=0.0), mask_samples=3, seed=2).train()
    one = dwm.mask_model(net, dwm.GumbelSigmoid(init=0.0), seed=2).train()
    torch.testing.assert_close(masked(x), torch.cat([one(row) for row in x.split(1)]))


def test_a_checkpoint_inside_redraws_the_mask_of_a_host() -> None:
    class Body(nn.Module):
        def __init__(self, around: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.around = First(nn.LSTM(6, 6, batch_first=True)), around

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = checkpoint(self.rnn, x, use_reentrant=False) if self.around else self.rnn(x)
            return found

    torch.manual_seed(1)
    x, grads = torch.randn(2, 4, 6), []
    for around in (False, True):
        masked = dwm.mask_model(Body(around), dwm.GumbelSigmoid(init=0.0), seed=3).train()
        masked(x).square().sum().backward()
        grads.append([logits.grad for logits in masked.mask_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_sees_masked_parameters_in_their_own_dtype() -> None:
    net, x, options, _ = _made("attention")
    masked = _masked(net, options)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        # bf16 has 8 bits: the same products in the same dtypes, in another order of sums of 6 terms
        torch.testing.assert_close(masked(x), _naive(net, masked.keep_masks())(x))


# --- what it becomes


@SORTS
def test_merging_gives_the_network_of_before_over_masked_weights(sort: str) -> None:
    net, x, options, _ = _made(sort)
    masked = _masked(net, options)
    merged, naive = dwm.merge(masked), _naive(net, masked.keep_masks())
    assert _same_modules(merged, net)
    assert repr(merged) == repr(net)
    assert list(merged.state_dict()) == list(net.state_dict())
    for (name, value), expected in zip(merged.named_parameters(), naive.parameters(), strict=True):
        assert torch.equal(value, expected), name
        assert value.requires_grad
    torch.testing.assert_close(merged(x), naive(x))


@SORTS
def test_a_packed_network_computes_the_same_and_merges_to_the_same(sort: str) -> None:
    net, x, options, _ = _made(sort)
    masked = _masked(net, options)
    packed, naive = dwm.pack(masked), _naive(net, masked.keep_masks())
    with torch.no_grad(), dwm.use_way("staged"):
        first = packed(x)
        torch.testing.assert_close(first, naive(x))
        torch.testing.assert_close(packed(x), first)  # the second call reads what the first one kept
        torch.testing.assert_close(copy.deepcopy(packed)(x), first)
    merged = dwm.merge(packed)
    assert _same_modules(merged, net)
    for name, value in naive.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name


def test_a_packed_parameter_follows_its_bits_and_weight() -> None:
    net, x, options, _ = _made("Conv1D")
    packed = dwm.pack(_masked(net, options))
    before = packed(x)
    packed.get_submodule("0.masked_weight").bits.zero_()
    assert torch.equal(packed.get_submodule("0").weight, torch.zeros(6, 8))
    assert not torch.equal(packed(x), before)


@SORTS
def test_a_saved_masked_model_is_loaded_over_the_plain_network(sort: str, tmp_path: Path) -> None:
    net, x, options, _ = _made(sort)
    masked = _masked(net, options)
    dwm.save_masked(masked, tmp_path / "m.safetensors")
    loaded = dwm.load_masked(net, tmp_path / "m.safetensors").eval()
    assert list(loaded.mask_layers()) == list(masked.mask_layers())
    torch.testing.assert_close(loaded(x), masked(x))
    torch.testing.assert_close(loaded.train()(x), masked.train()(x))  # the noise goes on too


@SORTS
def test_deep_copies_and_pickles_are_networks_of_their_own(sort: str) -> None:
    net, x, options, _ = _made(sort)
    masked = _masked(net, options)
    file = io.BytesIO()
    torch.save(masked, file)
    file.seek(0)
    for other in (copy.deepcopy(masked), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x), masked(x))
        expected = masked(x)
        with torch.no_grad():
            for logits in other.mask_parameters():
                logits.neg_()
        assert (other(x) - expected).abs().max() > 1e-2
        torch.testing.assert_close(masked(x), expected)


@SORTS
def test_a_network_moves_to_another_dtype_and_a_state_dict_comes_back(sort: str) -> None:
    net, x, options, _ = _made(sort)
    masked = _masked(net, options)
    state = copy.deepcopy(masked.state_dict())
    double = copy.deepcopy(masked).double()
    assert all(logits.dtype == torch.float32 for logits in double.mask_parameters())
    y = x.double() if x.is_floating_point() else x
    torch.testing.assert_close(double(y), _naive(net, masked.keep_masks()).double()(y))
    other = _masked(net, options, seed=5)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), masked(x))


# --- banks


@SORTS
def test_a_bank_serves_each_domain_and_each_sample_its_own(sort: str, tmp_path: Path) -> None:
    net, x, options, _ = _made(sort)
    domains = {name: _masked(net, options, seed) for seed, name in enumerate(("art", "photo"), start=1)}
    bank = dwm.MaskBank(net)
    for name, masked in domains.items():
        bank.add(name, masked)
    bank.save(tmp_path / "bank")
    with torch.no_grad():
        naive = {name: _naive(net, masked.keep_masks()) for name, masked in domains.items()}
        for served in (bank, dwm.MaskBank.load(tmp_path / "bank", net)):
            for name in ("art", "photo", "art"):
                served.activate(name)
                torch.testing.assert_close(served(x), naive[name](x))
            served.activate(None)
            torch.testing.assert_close(served(x), net(x))
            asked = ["photo", "art", "photo"]
            expected = torch.cat([naive[name](row) for name, row in zip(asked, x.split(1), strict=True)])
            torch.testing.assert_close(served(x, domains=asked), expected)


def test_a_domain_of_kept_values_and_edits_of_a_recurrent_layer_are_served() -> None:
    net, x, options, _ = _made("LSTM")
    masked = _masked(net, options)
    edited = dwm.mask_model(net, dwm.Edit(spread=0.1)).eval()
    bank = dwm.MaskBank(net)
    bank.add("kept", masked, form="kept")
    bank.add("edited", edited)
    with torch.no_grad():
        bank.activate("kept")
        torch.testing.assert_close(bank(x), _naive(net, masked.keep_masks())(x))
        bank.activate("edited")
        # edits are stored in fp16: 2^-11 of an edit of at most 0.1 * 4 deviations of half a weight's own
        torch.testing.assert_close(bank(x), dwm.merge(edited)(x), rtol=1e-3, atol=1e-3)


# --- what is asked for, and refused


def test_names_of_modules_and_of_parameters_choose_masks() -> None:
    net = nn.ModuleDict({"rnn": nn.LSTM(6, 4), "gpt": Conv1D(4, 6), "mix": Experts()})
    choose = dwm.nn.maskable_weights
    assert list(choose(net)) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "gpt", "mix.up_proj", "mix.down_proj"]
    assert list(choose(net, include="rnn")) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert list(choose(net, include="*_ih_*, gpt.weight")) == ["rnn.weight_ih_l0", "gpt"]
    assert list(choose(net, exclude=["rnn.weight_hh_l0", "mix"])) == ["rnn.weight_ih_l0", "gpt"]
    assert list(choose(net, include="gpt", also="rnn.bias_ih_l0")) == ["rnn.bias_ih_l0", "gpt"]
    assert list(choose(net, include="gpt", also="mix.scales")) == ["gpt", "mix.scales"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda net, m: m.model[0](torch.ones(1, 6)), "this Conv1D belongs to a masked model.*dwm_fast.merge"),
        (lambda net, m: m.mask_layers()["0"].stand_alone(), "'weight' of a Conv1D is drawn by its masked model"),
        (lambda net, m: dwm.explain(m.mask_layers()["0"], (1, 6)), "explain got MaskedParameter"),
        (lambda net, m: dwm.mask_model(m.model, dwm.Edit()), "layers '0', '1': each is masked already; give"),
        (lambda net, m: dwm.mask_model(net, dwm.Edit(), tied="yes"), "tied='yes'; expected 'refuse', or 'share'"),
        (
            lambda net, m: dwm.mask_model(net, dwm.GumbelSigmoid(), memory="streamed"),
            r"memory='streamed' learns the weights of Linear and Conv2d layers.*0: neither.*exclude=\['0'\]",
        ),
        (
            lambda net, m: dwm.mask_model(Tied(), dwm.GumbelSigmoid(), memory="streamed", tied="share"),
            r"head: of several places; leave out with exclude=\['head'\]",
        ),
        (
            lambda net, m: dwm.mask_model(nn.Sequential(Conv1D(3, 6)), dwm.SemiStructured(2, 4)),
            "layer '0': .*",
        ),
    ],
)
def test_what_a_host_cannot_is_one_line(act: Callable[[nn.Module, dwm.MaskedModel], Any], message: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(4, 6), nn.Linear(4, 2))
    with pytest.raises(InputError, match=message) as caught:
        act(net, dwm.mask_model(net, dwm.GumbelSigmoid()))
    assert "\n" not in str(caught.value)


def test_a_tied_weight_is_refused_by_both_names_until_one_mask_is_asked_for() -> None:
    message = (
        r"'head.weight' and 'tokens.weight' are one tied tensor.*tied='share', or exclude it with exclude=\['head'\]"
    )
    with pytest.raises(InputError, match=message):
        dwm.mask_model(Tied(), dwm.GumbelSigmoid())
    masked = dwm.mask_model(Tied(), dwm.GumbelSigmoid(), tied="share")
    assert sum(isinstance(layer, MaskedParameter) for layer in masked.mask_layers().values()) == 0
    merged = dwm.merge(masked)
    assert merged.head.weight is merged.tokens.weight


def test_a_network_of_the_meta_device_starts_with_the_masks_of_a_fresh_one() -> None:
    torch.manual_seed(0)
    real = First(nn.LSTM(6, 4, batch_first=True))
    with torch.device("meta"):
        net = First(nn.LSTM(6, 4, batch_first=True))
    masked = dwm.mask_model(net, dwm.Edit(), seed=1).to_empty(device="cpu")
    masked.load_state_dict({f"model.{n}": t for n, t in real.state_dict().items()}, strict=False)
    fresh, x = dwm.mask_model(real, dwm.Edit(), seed=1), torch.randn(2, 3, 6)
    for a, b in zip(masked.mask_layers().values(), fresh.mask_layers().values(), strict=True):
        assert torch.equal(a.mask_logits, b.mask_logits)
        assert a.unit == b.unit
    torch.testing.assert_close(masked.eval()(x), fresh.eval()(x))
