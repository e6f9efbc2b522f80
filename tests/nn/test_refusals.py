"""What mask_model and a masked model refuse, in one line whose advice works when it is followed."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.nn import maskable_weights

pytestmark = [
    pytest.mark.usefixtures("reference", "poison"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]

COMPUTED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.5), "weight", 0.5),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "weight norm": utils.weight_norm,
    "weight norm of the bias": lambda layer: utils.weight_norm(layer, "bias", dim=None),
    "spectral norm": utils.spectral_norm,
    "parametrised weight norm": parametrizations.weight_norm,
    "parametrised spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    "parametrised bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
}


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def _computed(name: str, called: bool) -> nn.Sequential:
    net = _net()
    COMPUTED[name](net[2])
    if called:
        net(torch.ones(1, 4))
    return net.eval()


def _refused(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- computed weights


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_refused_and_undoing_it_as_advised_makes_it_maskable(name, called):
    net, x = _computed(name, called), torch.randn(3, 4)
    message = _refused(lambda: dwm.mask_model(net, dwm.GumbelSigmoid()))
    advice = re.match(r"layer '2' has a computed (?:weight|bias); undo that with (torch\.nn\.utils\.[^;]+);", message)
    assert advice is not None, message
    expected = net(x)
    exec(advice[1], {"torch": torch, "layer": net[2]})
    masked = dwm.mask_model(net, dwm.GumbelSigmoid()).eval()
    assert list(masked.mask_layers()) == ["0", "2"]
    assert torch.equal(masked(x), net(x))  # every weight is kept at first
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("name", [name for name in COMPUTED if not name.endswith("bias")])
def test_a_weight_that_is_computed_since_mask_model_is_refused_at_the_next_call(name):
    masked, x = dwm.mask_model(_net(), dwm.GumbelSigmoid(), seed=0), torch.ones(1, 4)

    def compute_and_call():
        COMPUTED[name](masked.model[2])
        masked(x)

    message = _refused(compute_and_call)
    assert re.match(r"a masked layer has a computed weight; undo that with .*; do so to the plain network", message)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_network_with_a_computed_weight_is_masked_around_it(name, called):
    net, x = _computed(name, called), torch.randn(3, 4)
    message = _refused(lambda: dwm.mask_model(net, dwm.GumbelSigmoid()))
    excluded = eval(re.search(r"exclude=(\[.*?\]) or skip_unmaskable=True", message)[1])
    for masked in (
        dwm.mask_model(net, dwm.GumbelSigmoid(), exclude=excluded),
        dwm.mask_model(net, dwm.GumbelSigmoid(), skip_unmaskable=True),
    ):
        assert list(masked.mask_layers()) == ["0"]
        assert torch.equal(masked.eval()(x), net(x))
        masked.train()(x).sum().backward()
        assert torch.equal(dwm.merge(masked.eval())(x), masked(x))


def test_a_single_layer_with_a_computed_weight_is_refused_too():
    for name in COMPUTED:
        assert "has a computed" in _refused(lambda name=name: dwm.MaskedLinear.from_linear(_computed(name, True)[2]))


def test_a_weight_that_is_a_plain_attribute_is_refused():
    net = _net()
    weight = net[2].weight.detach()
    del net[2].weight
    net[2].weight = weight
    assert "make it a torch.nn.Parameter" in _refused(lambda: dwm.mask_model(net, dwm.Edit()))


# --- all at once, patterns, strange models


def _quantised(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    return layer


class Packed(torch.Tensor):
    """Int8 values with a scale that claim to be fp32, as torchao's are; what is not written down is an error."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return Packed(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Packed(func(args[0].values), func(args[0].scale))
        if func is torch.ops.aten.t.default:
            return args[0].values.t() * args[0].scale
        raise NotImplementedError(f"Packed: {func}")


def _packed_first() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    values = torch.randint(-9, 9, (4, 4), dtype=torch.int8)
    net[0].weight = nn.Parameter(Packed(values, torch.tensor(0.1)), requires_grad=False)
    return net


def test_a_network_with_weights_of_a_quantised_class_is_masked_and_served_around_them(tmp_path):
    net, x = _packed_first(), torch.ones(1, 4)
    message = _refused(lambda: dwm.mask_model(net, dwm.GumbelSigmoid()))
    assert message.startswith("layer '0' has a weight of torch.float32 in a Packed")
    masked = dwm.mask_model(net, dwm.Threshold(), skip_unmaskable=True).eval()
    with torch.no_grad():
        masked.mask_layers()["1"].mask_logits[0] = -1.0
    bank = dwm.MaskBank(net)
    bank.add("a", masked)
    bank.activate("a")
    assert torch.equal(bank(x), masked(x))
    assert torch.equal(dwm.merge(masked)(x), masked(x))
    with torch.no_grad():
        net[0].weight.scale.mul_(2.0)
    assert not torch.equal(bank(x), masked(x))
    assert "'model.0.weight' of the model's state is Packed" in _refused(
        lambda: dwm.save_masked(masked, tmp_path / "m.safetensors")
    )


def _set_forward() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.forward = torch.tanh
    return layer


def test_all_layers_that_cannot_be_masked_are_named_at_once():
    net = nn.ModuleDict({"good": nn.Linear(2, 2)})
    net.update({f"own{i}": _set_forward() for i in range(7)})
    net["int8"] = _quantised(torch.int8)
    net["float8"] = _quantised(torch.float8_e4m3fn)
    net["sparse"] = nn.Linear(2, 2)
    net["sparse"].weight = nn.Parameter(torch.eye(2).to_sparse())
    message = _refused(lambda: dwm.mask_model(net, dwm.Threshold()))
    assert "layers 'own0', 'own1', 'own2', 'own3', 'own4', 'own5', 'own6': each has a forward that was set" in message
    for name, what in (("int8", "torch.int8"), ("float8", "torch.float8_e4m3fn"), ("sparse", "torch.sparse_coo")):
        assert re.search(f"layer '{name}' has a weight of [^;]*{what}[^;]*;", message)
    excluded = eval(re.search(r"exclude=(\[.*?\]) or", message)[1])
    assert list(maskable_weights(net, exclude=excluded)) == ["good"]
    assert list(maskable_weights(net, skip_unmaskable=True)) == ["good"]
    only_bad = nn.Sequential(_set_forward())
    assert "no weight fits include=" in _refused(lambda: maskable_weights(only_bad, skip_unmaskable=True))


@pytest.mark.parametrize("what", ["include", "exclude"])
@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("head", r"=\['head'\] fits no layer; the model has: stem, body\.0, body\.1\.0, fc"),
        (["fc", "haed"], r"=\['haed'\] fits no layer"),
        ("body", r"=\['body'\] fits no layer; write 'body\.\*' for the layers inside"),
        (["body.1"], r"=\['body\.1'\] fits no layer; write 'body\.1\.\*'"),
        (["fc", 3], "holds a int; expected names"),
        (None, "holds a NoneType"),
        (nn.Linear(1, 1), "holds a Linear"),
    ],
)
def test_a_pattern_that_fits_no_layer_is_refused(what, patterns, message):
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 2, 1))
    net.add_module("body", nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))))
    net.add_module("norm", nn.BatchNorm1d(2))
    net.add_module("fc", nn.Linear(2, 2))
    assert re.search(what + " ?" + message, _refused(lambda: dwm.mask_model(net, dwm.Edit(), **{what: patterns})))
    assert len(maskable_weights(net, exclude=["norm", "body.*"])) == 2  # a module that is never masked may be named


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear, "the model is the class Linear; expected a torch.nn.Module"),
        ({"weight": torch.ones(1)}, "the model is a dict"),
        (None, "the model is a NoneType"),
    ],
)
def test_what_is_no_network_is_refused(model, message):
    assert message in _refused(lambda: dwm.mask_model(model, dwm.Edit()))


def test_a_scripted_network_is_refused():
    scripted = torch.jit.trace(_net(), torch.ones(1, 4))
    assert "ScriptModule" in _refused(lambda: dwm.mask_model(scripted, dwm.Edit()))


def test_lazy_layers_are_named_at_once_and_one_call_makes_them_maskable():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4), nn.LazyLinear(2))
    message = _refused(lambda: dwm.mask_model(net, dwm.Threshold()))
    assert message.startswith("'0', '2' has no weight yet (lazy module); call the model once on an input")
    net(torch.ones(1, 3))
    assert len(dwm.mask_model(net, dwm.Threshold()).mask_layers()) == 3


# --- inference mode


def test_a_network_made_under_inference_mode_is_masked_as_a_copy():
    with torch.inference_mode():
        net = _net()
    message = _refused(lambda: dwm.mask_model(net, dwm.GumbelSigmoid()))
    assert "give a copy made outside of it, copy.deepcopy(model)" in message
    masked = dwm.mask_model(copy.deepcopy(net), dwm.GumbelSigmoid()).train()
    masked(torch.ones(1, 4)).sum().backward()
    assert all(p.grad is not None for p in masked.mask_parameters())


def test_what_was_made_or_called_under_inference_mode_can_be_trained_afterwards():
    net, x = _net(), torch.ones(2, 4)
    with torch.inference_mode():
        masked = dwm.mask_model(net, dwm.GumbelSigmoid(init=0.5), seed=1)
        for mode in (True, False):
            masked.train(mode)(x)
            masked.sparsity_penalty()
        merged = dwm.merge(masked)
        layer = dwm.mask_model(net, dwm.GumbelSigmoid()).model[0]
        layer.stand_alone(seed=3)
    (masked.train()(x).sum() + masked.sparsity_penalty()).backward()
    assert all(p.grad.any() for p in masked.mask_parameters())
    merged(x.clone().requires_grad_()).sum().backward()
    assert merged[0].weight.grad is not None
    layer(x).sum().backward()
    assert layer.mask_logits.grad is not None


# --- replaced layers


def _replace(name: str):
    def act(masked: dwm.MaskedModel) -> None:
        masked.model.set_submodule(name, nn.Linear(4, 4) if "." in name else nn.Sequential(nn.Linear(4, 4)))

    return act


@pytest.mark.parametrize("name", ["body.0", "body", "head"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_masked_layer_that_was_replaced_is_noticed_at_every_door(name, copied):
    def network():
        net = nn.Sequential()
        net.add_module("body", nn.Sequential(nn.Linear(4, 4)))
        net.add_module("head", nn.Linear(4, 4))
        return net

    masked = dwm.mask_model(network(), dwm.GumbelSigmoid())
    masked(torch.ones(1, 4))
    _replace(name)(masked)
    if copied:
        masked = copy.deepcopy(masked)
    layer = "head" if name == "head" else "body.0"
    doors = [
        lambda: masked(torch.ones(1, 4)),
        masked.keep_masks,
        masked.fraction_kept,
        lambda: dwm.merge(masked),
        lambda: dwm.pack(masked),
        lambda: dwm.save_masked(masked, io.BytesIO()),
        lambda: dwm.MaskBank(network()).add("a", masked),
    ]
    for door in doors:
        assert f"replaced after mask_model, which took them down: '{layer}'" in _refused(door)
    # both ways out that the message names
    left_out = dwm.mask_model(network(), dwm.GumbelSigmoid(), exclude=[layer])
    _replace(name)(left_out)
    left_out(torch.ones(1, 4))


def test_wrapping_a_masked_layer_is_no_replacement():
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(), seed=0).eval()
    expected = masked(torch.ones(1, 4))
    masked.model[0] = nn.Sequential(masked.model[0])
    assert torch.equal(masked(torch.ones(1, 4)), expected)
    masked.model = torch.compile(masked.model, backend="eager")
    assert torch.equal(masked(torch.ones(1, 4)), expected)
    masked.model = nn.Identity()
    _refused(lambda: masked(torch.ones(1, 4)))


# --- the meta device


META_KINDS = [
    dwm.GumbelSigmoid(tau=0.3, init=1.5),
    dwm.Threshold(),
    dwm.Threshold(scheme="uniform"),
    dwm.Threshold(scheme="weight_based_1s"),
    dwm.Edit(spread=0.1),
    dwm.KernelSoft(),
]


@pytest.mark.parametrize("kind", META_KINDS, ids=repr)
def test_a_network_off_the_meta_device_starts_as_a_fresh_one_would(kind):
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    real = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    masked = dwm.mask_model(empty, kind, seed=5)
    masked.to_empty(device="cpu")
    torch.manual_seed(7)
    masked.model.load_state_dict(real.state_dict(), strict=False)
    torch.manual_seed(7)
    fresh = dwm.mask_model(real, kind, seed=5)
    assert masked.rng_state.tolist() == fresh.rng_state.tolist()
    assert torch.equal(masked.tau, fresh.tau)
    for mine, theirs in zip(masked.mask_layers().values(), fresh.mask_layers().values(), strict=True):
        assert torch.equal(mine.mask_logits, theirs.mask_logits)
        assert mine.unit == theirs.unit
        assert mine.mask_logits.requires_grad
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(masked.train()(x), fresh.train()(x))
    with torch.no_grad():
        next(masked.mask_parameters()).fill_(0.5)
    masked.model.load_state_dict(real.state_dict(), strict=False)  # trained masks stay
    assert (next(masked.mask_parameters()) == 0.5).all()


@pytest.mark.parametrize("kind", META_KINDS, ids=repr)
def test_a_layer_alone_off_the_meta_device_has_its_seed_and_temperature(kind):
    layer = dwm.MaskedLinear(4, 3, kind=kind, seed=9, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    fresh = dwm.MaskedLinear(4, 3, kind=kind, seed=9)
    assert layer.rng_state.tolist() == [9, 0]
    assert torch.equal(layer.tau, fresh.tau)
    assert layer.mask_logits.isfinite().all()
    assert layer(torch.ones(1, 4)).isfinite().all()


# --- torch.func, TorchScript, ONNX


def test_torch_func_works_in_the_inputs_and_is_refused_in_the_mask_parameters():
    masked, x = dwm.mask_model(_net(), dwm.GumbelSigmoid(init=0.5)).eval(), torch.randn(3, 4)
    plain = dwm.merge(masked)
    torch.testing.assert_close(torch.func.vmap(masked)(x), plain(x))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(masked)(x), transform(plain)(x))
    logits = {n: p for n, p in masked.named_parameters() if n.endswith("mask_logits")}

    def loss(parameters, inputs):
        return torch.func.functional_call(masked, parameters, (inputs,)).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    for call in (
        lambda: torch.func.grad(loss)(logits, x),
        lambda: torch.func.jacrev(loss)(logits, x),
        lambda: per_sample(logits, x),
    ):
        assert "use loss.backward(), or transform the plain network, dwm_fast.merge(masked)" in _refused(call)
    weights = dict(plain.named_parameters())
    torch.func.grad(lambda w: torch.func.functional_call(plain, w, (x,)).sum())(weights)


def test_scripting_says_to_merge_first_and_the_merged_network_can_be_scripted():
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid()).eval()
    for module in (masked, nn.Sequential(masked), dwm.MaskedLinear(2, 2)):
        assert "script the plain network, dwm_fast.merge(masked)" in _refused(lambda m=module: torch.jit.script(m))
    plain = dwm.merge(masked)
    assert torch.equal(torch.jit.script(plain)(torch.ones(1, 4)), masked(torch.ones(1, 4)))


def test_export_to_onnx_says_to_merge_first():
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid()).eval()
    message = _refused(lambda: torch.onnx.export(masked, (torch.ones(1, 4),), io.BytesIO(), dynamo=False))
    assert "export the plain one, dwm_fast.merge(masked)" in message
