"""mask_model and MaskedModel: any network, all masks in one draw, the given network untouched."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.nn import maskable_weights

pytestmark = pytest.mark.usefixtures("reference", "poison")

KINDS = [
    dwm.GumbelSigmoid(init=0.5),
    dwm.GumbelSigmoid(init=0.5, hard=False),
    dwm.Threshold(),
    dwm.Threshold(ternary=True),
    dwm.Edit(),
]


class Net(nn.Module):
    """A convolution with batch norm, a residual pair and a head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding="same"), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.block(x)).mean((2, 3)))


def _net(width: int = 6) -> Net:
    torch.manual_seed(0)
    return Net(width)


def _x(batch: int = 5) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _spread(masked: dwm.MaskedModel) -> dwm.MaskedModel:
    """Learned tensors with values on both sides of every threshold."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in masked.mask_parameters():
            p.copy_(2 * torch.randn(p.shape, generator=generator))
    return masked


def _snapshot(model: nn.Module) -> dict:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grad": {k: (p.requires_grad, p.grad) for k, p in model.named_parameters()},
        "mode": {k: m.training for k, m in model.named_modules()},
        "type": {k: type(m) for k, m in model.named_modules()},
    }


# --- the given network


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_training_a_masked_network_leaves_the_given_one_bit_identical(batch_norm):
    plain = _net()
    plain.stem.weight.requires_grad_(False)
    before = _snapshot(plain)
    masked = dwm.mask_model(plain, dwm.GumbelSigmoid(init=0.0), batch_norm=batch_norm)
    masked.train()
    opt = torch.optim.AdamW([p for p in masked.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        opt.zero_grad()
        (masked(_x()).square().mean() + masked.sparsity_penalty()).backward()
        opt.step()
    after = _snapshot(plain)
    assert all(torch.equal(before["state"][k], after["state"][k]) for k in before["state"])
    assert before["state"].keys() == after["state"].keys()
    assert all(before[k] == after[k] for k in ("grad", "mode", "type"))


def test_masked_weights_are_shared_and_everything_else_is_a_copy():
    plain = _net()
    masked = dwm.mask_model(plain, dwm.GumbelSigmoid(), exclude=["head"])
    mine, theirs = dict(masked.model.named_parameters()), dict(plain.named_parameters())
    shared = {k for k in theirs if mine[k].data_ptr() == theirs[k].data_ptr()}
    assert shared == {"stem.weight", "block.0.weight"}
    trainable = {k for k, p in mine.items() if p.requires_grad}
    assert trainable == {"stem.mask_logits", "block.0.mask_logits"}
    assert not hasattr(masked.model.head, "mask_logits")


def test_include_and_exclude_are_shell_patterns_over_whole_names():
    net = _net()
    assert list(maskable_weights(net)) == ["stem", "block.0", "head"]
    assert list(maskable_weights(net, include=["block.*"])) == ["block.0"]
    assert list(maskable_weights(net, include=["*"], exclude=["s*", "head"])) == ["block.0"]
    assert list(maskable_weights(net, exclude="head")) == ["stem", "block.0"]
    for text in (
        "stem, head",
        "stem', 'head",
        '"stem","head"',
        "s*,head",
    ):  # as lists are typed and as errors show them
        assert list(maskable_weights(net, exclude=text)) == list(maskable_weights(net, exclude=[text])) == ["block.0"]
    assert list(maskable_weights(net, include="stem")) == ["stem"]
    assert list(dwm.mask_model(net, dwm.Threshold(), include="b*").mask_layers()) == ["block.0"]
    with pytest.raises(InputError, match=r"include=\['conv'\].*the model has: stem, block.0, head"):
        dwm.mask_model(net, dwm.Threshold(), include=["conv"])
    with pytest.raises(InputError, match="none at all"):
        dwm.mask_model(nn.ReLU(), dwm.Threshold())


def test_a_single_layer_is_a_network_too():
    plain = nn.Linear(3, 2)
    masked = dwm.mask_model(plain, dwm.Threshold())
    assert torch.equal(masked(torch.ones(1, 3)), plain(torch.ones(1, 3)))
    assert list(masked.mask_layers()) == [""]
    assert isinstance(dwm.merge(masked), nn.Linear)


def _set_forward() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].forward = torch.tanh
    return net


def _tied() -> nn.Module:
    net = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    net["head"].weight = net["embedding"].weight
    return net


def _reused() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_tied, r"'head.weight' and 'embedding.weight' are one tied tensor.*exclude=\['head'\]"),
        (_reused, r"'2.weight' and '0.weight' are one tied tensor.*exclude=\['0'\]"),
        (_set_forward, r"'0' has a forward that was set on this one object.*exclude=\['0'\]"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), "'0' has a computed weight"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "'0' has no weight yet"),
        (lambda: nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)), r"weight of torch\.complex64"),
        (lambda: dwm.mask_model(_net(), dwm.Threshold()), "'model.stem'.*is masked already.*merge"),
    ],
)
def test_layers_that_cannot_be_masked_are_refused_by_name(make, message):
    with pytest.raises(InputError, match=message) as caught:
        dwm.mask_model(make(), dwm.GumbelSigmoid())
    assert "\n" not in str(caught.value)


def test_refused_layers_can_be_excluded():
    masked = dwm.mask_model(_set_forward(), dwm.Threshold(), exclude=["0"])
    assert list(masked.mask_layers()) == ["1"]


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"mask_samples": 0}, "mask_samples=0"),
        ({"mask_samples": 1.5}, "mask_samples=1.5"),
        ({"seed": 1.5}, "seed=1.5; expected a whole number"),
        ({"seed": "7"}, "seed='7'; expected a whole number"),
        ({"batch_norm": "fixed"}, "batch_norm='fixed'; expected 'frozen' or 'train'"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
    ):
        with pytest.raises(InputError, match=message):
            dwm.mask_model(_net(), dwm.Threshold(), **settings)
    with pytest.raises(InputError, match="no masked layer"):
        dwm.MaskedModel(_net())
    mixed = nn.Sequential(dwm.MaskedLinear(2, 2, kind=dwm.Edit()), dwm.MaskedLinear(2, 2, kind=dwm.Threshold()))
    with pytest.raises(InputError, match="different mask kinds"):
        dwm.MaskedModel(mixed)


@pytest.mark.parametrize("kind", [dwm.GumbelSigmoid, dwm.Edit, "gumbel-sigmoid", None, 0.5])
def test_what_is_no_mask_kind_is_refused_in_one_line(kind):
    expected = f"expected an object: {kind.__name__}" if isinstance(kind, type) else "expected one of GumbelSigmoid"
    doors = [lambda: dwm.mask_model(_net(), kind)]
    if kind is not None:  # a layer alone has a kind of its own by default
        doors += [
            lambda: dwm.MaskedLinear(2, 2, kind=kind),
            lambda: dwm.MaskedConv2d.from_conv(nn.Conv2d(1, 1, 1), kind),
        ]
    for door in doors:
        with pytest.raises(InputError, match=expected) as caught:
            door()
        assert "\n" not in str(caught.value)


def test_a_seed_may_be_any_whole_number():
    for seed in (7, np.int64(7), torch.tensor(7)):
        assert dwm.mask_model(_net(), dwm.GumbelSigmoid(), seed=seed).rng_state.tolist() == [7, 0]


@pytest.mark.parametrize("given", [_net(), nn.Linear(2, 2), {"a": 1}, None], ids=lambda g: type(g).__name__)
def test_what_is_no_masked_model_is_refused_by_merge_and_pack(given):
    for name in ("merge", "pack"):
        with pytest.raises(InputError, match=f"{name} got {type(given).__name__}; expected a MaskedModel"):
            getattr(dwm, name)(given)


# --- what a call computes


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_training_call_is_the_plain_network_under_the_drawn_weights(kind):
    masked = _spread(dwm.mask_model(_net(), kind, seed=7)).train()
    layers = masked.mask_layers()
    drawn, _, _ = dwm.ops.sample(
        [m.mask_logits for m in layers.values()],
        [m.weight for m in layers.values()],
        masked.rng_state.clone(),
        masked.tau,
        mode=kind.training_mode,
        thresholds=[m.unit for m in layers.values()],
    )
    plain = _net().eval()
    with torch.no_grad():
        for name, weight in zip(layers, drawn, strict=True):
            plain.get_submodule(name).weight.copy_(weight)
    assert torch.equal(masked(_x()), plain(_x()))


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_evaluation_is_deterministic_and_equals_the_merged_plain_network(kind):
    plain = _net()
    plain(_x())  # moves the running statistics
    masked = _spread(dwm.mask_model(plain, kind)).eval()
    merged = dwm.merge(masked)
    assert not merged.training
    assert torch.equal(masked(_x()), merged(_x()))
    assert torch.equal(masked(_x()), masked(_x()))
    assert {type(m) for m in merged.modules()} == {type(m) for m in plain.modules()}
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    with torch.no_grad():
        for p in merged.parameters():
            p.fill_(7.0)
    assert not torch.equal(masked(_x()), merged(_x()))
    if not isinstance(kind, dwm.Edit):
        for name, keep in masked.keep_masks().items():
            zero = dwm.merge(masked).get_submodule(name).weight == 0
            assert torch.equal(zero, ~keep)


def test_merging_keeps_hooks_dtype_strides_and_train_state():
    net = _net().to(torch.bfloat16, memory_format=torch.channels_last)
    calls = []
    net.stem.register_forward_hook(lambda *args: calls.append(1))
    masked = dwm.mask_model(net, dwm.GumbelSigmoid()).train()
    with torch.autocast("cpu", dtype=torch.float16):
        merged = dwm.merge(masked)
    assert merged.stem.weight.dtype == torch.bfloat16
    assert merged.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert merged.training
    assert merged.norm.training
    merged(_x().bfloat16())
    assert calls == [1]
    assert not hasattr(merged.stem, "mask_logits")
    assert repr(merged.stem) == repr(net.stem)


class Reader(nn.Module):
    """Weights that are read without their layer being called, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.a.weight)
        return self.attention(y, y, y, need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_are_read_without_calling_the_layer_are_masked_too(training):
    torch.manual_seed(0)
    masked = _spread(dwm.mask_model(Reader(), dwm.GumbelSigmoid())).train(training)
    assert set(masked.mask_layers()) == {"a", "attention.out_proj", "attention.in_proj_weight"}
    x = torch.randn(2, 3, 4)
    if training:
        masked(x).sum().backward()
        assert all(p.grad.any() for p in masked.mask_parameters())
    else:
        # attention takes another kernel where other parameters need gradients, so not bit for bit
        torch.testing.assert_close(masked(x), dwm.merge(masked)(x))
    assert masked.model.a.weight.grad is None
    assert torch.equal(masked.model.a.weight, masked.model.a.frozen_weight)


def test_a_layer_inside_a_masked_network_says_who_draws_for_it():
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid())
    with pytest.raises(InputError, match="call the masked model"):
        masked.model.stem(_x())
    masked.model.stem.stand_alone(seed=1)
    masked.model.stem(_x())


def test_noise_follows_seed_and_step_and_is_left_alone_by_evaluation():
    def run(seed, calls=1):
        masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(init=0.0), seed=seed).train()
        return [masked(_x()) for _ in range(calls)], masked

    (a, b), masked = run(3, 2)
    assert torch.equal(run(3)[0][0], a)
    assert not torch.equal(run(4)[0][0], a)
    assert not torch.equal(a, b)
    assert masked.rng_state.tolist() == [3, 2]
    masked.eval()(_x())
    assert masked.rng_state.tolist() == [3, 2]
    masked.rng_state.copy_(torch.tensor([3, 0]))
    assert torch.equal(masked.train()(_x()), a)


def test_a_failing_forward_leaves_no_mask_behind():
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(init=0.0)).train()
    with pytest.raises(RuntimeError):
        masked(torch.ones(1, 5, 8, 8))
    assert all(layer._staged is None for layer in masked.mask_layers().values())
    masked(_x())


# --- mask samples


def test_mask_samples_split_the_batch_over_independent_masks():
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(init=0.0), mask_samples=3, seed=5).train()
    single = dwm.mask_model(_net(), dwm.GumbelSigmoid(init=0.0), seed=5).train()
    x = _x(7)
    out = masked(x)
    parts = [single(part) for part in x.tensor_split(3)]
    assert torch.equal(out, torch.cat(parts))
    assert masked.rng_state.tolist() == single.rng_state.tolist() == [5, 3]
    (out.square().sum() + masked.sparsity_penalty()).backward()
    (sum(p.square().sum() for p in parts) + single.sparsity_penalty()).backward()
    for a, b in zip(masked.mask_parameters(), single.mask_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.equal(masked.eval()(x), single.eval()(x))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_last_small_batch_gets_a_mask_for_each_sample(batch):
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(init=0.0), mask_samples=4, seed=5).train()
    assert masked(_x(batch)).shape == (batch, 4)
    assert masked.rng_state.tolist() == [5, 4]


def test_mask_samples_name_what_they_cannot_split():
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(), mask_samples=2).train()
    for args, kwargs in (((), {"x": _x()}), ((3,), {}), ((), {}), ((torch.tensor(1.0),), {})):
        with pytest.raises(InputError, match="mask_samples > 1 splits the batch"):
            masked(*args, **kwargs)
    reader = nn.Sequential(nn.Linear(2, 2))
    reader.forward = lambda x: {"out": x}
    several = dwm.mask_model(reader, dwm.GumbelSigmoid(), mask_samples=2).train()
    with pytest.raises(InputError, match="got a dict; expected a model that returns one tensor"):
        several(torch.ones(2, 2))


# --- batch norm, temperature, penalty


def test_batch_norm_is_frozen_in_training_unless_asked_otherwise():
    frozen = dwm.mask_model(_net(), dwm.GumbelSigmoid()).train()
    assert frozen.training
    assert frozen.model.stem.training
    assert not frozen.model.norm.training
    before = frozen.model.norm.running_mean.clone()
    frozen(_x())
    assert torch.equal(frozen.model.norm.running_mean, before)
    following = dwm.mask_model(_net(), dwm.GumbelSigmoid(), batch_norm="train").train()
    assert following.model.norm.training
    following(_x())
    assert not torch.equal(following.model.norm.running_mean, before)
    assert not following.eval().model.norm.training


@pytest.mark.parametrize("samples", [1, 2])
def test_the_temperature_follows_its_schedule_by_training_forwards(samples):
    kind = dwm.GumbelSigmoid(tau=dwm.TauSchedule(4.0, 1.0, 4), init=0.3)
    masked = dwm.mask_model(_net(), kind, seed=2, mask_samples=samples).train()
    for tau in (4.0, 4.0 * 0.25**0.25, 2.0):
        fixed = dwm.mask_model(_net(), dwm.GumbelSigmoid(tau=tau, init=0.3), seed=2, mask_samples=samples).train()
        fixed.rng_state.copy_(masked.rng_state)
        for model in (masked, fixed):
            model.zero_grad()
            model(_x(4)).square().sum().backward()
        for a, b in zip(masked.mask_parameters(), fixed.mask_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        masked.eval()(_x())
        masked.train()


def test_a_coefficient_means_the_same_for_every_network_size():
    values = []
    for width in (2, 24):
        masked = dwm.mask_model(_net(width), dwm.GumbelSigmoid(init=1.5))
        values.append(masked.sparsity_penalty().item())
    assert values == pytest.approx([1 / (1 + 2.718281828459045**-1.5)] * 2, rel=1e-6)
    assert dwm.mask_model(_net(), dwm.Edit()).sparsity_penalty().item() == 1.0
    assert dwm.mask_model(_net(), dwm.Threshold()).sparsity_penalty().item() == 0.0


def _expected_penalty(masked: dwm.MaskedModel) -> tuple[float, list[torch.Tensor]]:
    flat = torch.cat([p.detach().double().flatten() for p in masked.mask_parameters()])
    keep = [torch.sigmoid(p.detach().double()) for p in masked.mask_parameters()]
    return torch.sigmoid(flat).mean().item(), [k * (1 - k) / len(flat) for k in keep]


@pytest.mark.parametrize("between", ["nothing", "step", "backward", "no_grad", "eval", "load", "move", "twice"])
def test_the_penalty_is_that_of_the_logits_now_whatever_happened_since_the_draw(between):
    masked = _spread(dwm.mask_model(_net(), dwm.GumbelSigmoid(), seed=1)).train()
    if between == "no_grad":
        with torch.no_grad():
            masked(_x())
    else:
        out = masked(_x()).square().mean()
    if between in ("step", "backward"):
        out.backward()
    if between == "step":
        torch.optim.SGD(masked.mask_parameters(), lr=50.0).step()
    elif between == "eval":
        masked.eval()(_x())
    elif between == "load":
        masked.load_state_dict({k: -v if "logits" in k else v for k, v in masked.state_dict().items()})
    elif between == "move":
        masked.to("cpu", memory_format=torch.channels_last)
    elif between == "twice":
        masked.sparsity_penalty()
    masked.zero_grad()
    value, slopes = _expected_penalty(masked)
    penalty = masked.sparsity_penalty()
    penalty.backward()
    assert penalty.item() == pytest.approx(value, rel=1e-6)
    for p, slope in zip(masked.mask_parameters(), slopes, strict=True):
        torch.testing.assert_close(p.grad.double(), slope, rtol=1e-5, atol=1e-9)


def test_keep_masks_and_the_fraction_kept_count_the_same_weights():
    masked = _spread(dwm.mask_model(_net(), dwm.GumbelSigmoid()))
    keeps = masked.keep_masks()
    assert list(keeps) == ["stem", "block.0", "head"]
    for name, keep in keeps.items():
        layer = masked.mask_layers()[name]
        assert keep.dtype == torch.bool
        assert torch.equal(keep, layer.mask_logits >= 0)
    total = sum(k.numel() for k in keeps.values())
    assert masked.fraction_kept() == sum(int(k.sum()) for k in keeps.values()) / total


# --- copies, dtypes, devices


def test_state_dict_restores_a_training_run_over_another_network():
    a = _spread(dwm.mask_model(_net(), dwm.Edit(), seed=1)).train()
    a(_x())
    torch.manual_seed(9)
    b = dwm.mask_model(Net(), dwm.Edit(), seed=2).train()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(_x()), b(_x()))
    assert a.rng_state.tolist() == b.rng_state.tolist() == [1, 2]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_taken_mid_training_goes_on_alike_and_apart(copy_of):
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(init=0.0), seed=6).train()
    out = masked(_x())
    twin = copy_of(masked)
    assert torch.equal(masked(_x()), twin(_x()))
    assert [id(m) for m in twin.mask_layers().values()] == [
        id(m) for m in twin.modules() if isinstance(m, dwm.MaskedLinear | dwm.MaskedConv2d)
    ]
    (twin(_x()).sum() + twin.sparsity_penalty()).backward()
    assert all(p.grad is None for p in masked.mask_parameters())
    out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_change_of_dtype_keeps_logits_and_temperature_in_fp32(dtype):
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(tau=0.1, init=1 / 3)).to(dtype).train()
    assert {p.dtype for p in masked.mask_parameters()} == {masked.tau.dtype} == {torch.float32}
    assert all((p == torch.tensor(1 / 3)).all() for p in masked.mask_parameters())
    out = masked(_x().to(dtype))
    assert out.dtype == dtype
    (out.float().sum() + masked.sparsity_penalty()).backward()
    assert {p.grad.dtype for p in masked.mask_parameters()} == {torch.float32}


def test_the_meta_device_holds_shapes_alone():
    masked = dwm.mask_model(_net().to("meta"), dwm.GumbelSigmoid())
    assert masked.train()(_x().to("meta")).shape == (5, 4)
    assert dwm.mask_model(_net(), dwm.Edit()).to("meta").eval()(_x().to("meta")).shape == (5, 4)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_writes_masked_weights_in_its_own_dtype(training):
    masked = _spread(dwm.mask_model(_net(), dwm.GumbelSigmoid(), seed=1)).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked(_x())
    assert out.dtype == torch.bfloat16
    masked.rng_state.copy_(torch.tensor([1, 0]))
    torch.testing.assert_close(out.float(), masked(_x()), rtol=0.1, atol=0.1)
    if training:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(masked(_x()).float(), torch.arange(5) % 4) + masked.sparsity_penalty()
        loss.backward()
        assert {p.grad.dtype for p in masked.mask_parameters()} == {torch.float32}


def test_a_part_of_the_network_may_leave_autocast():
    class Careful(Net):
        def forward(self, x):
            x = self.norm(self.stem(x)).relu()
            with torch.autocast("cpu", enabled=False):
                return self.head((x.float() + self.block(x.float())).mean((2, 3)))

    masked = dwm.mask_model(Careful(), dwm.GumbelSigmoid()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked(_x())
    assert out.dtype == torch.float32
    out.sum().backward()


def test_layers_of_different_dtypes_each_keep_their_own():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2, dtype=torch.bfloat16)

        def forward(self, x):
            return self.b(self.a(x).bfloat16())

    masked = dwm.mask_model(Mixed(), dwm.GumbelSigmoid()).train()
    assert masked(torch.ones(1, 4)).dtype == torch.bfloat16


def test_channels_last_is_kept_through_the_network():
    seen = []
    net = _net().to(memory_format=torch.channels_last)
    net.block.register_forward_hook(lambda m, i, o: seen.append(o.is_contiguous(memory_format=torch.channels_last)))
    masked = dwm.mask_model(net, dwm.GumbelSigmoid()).train()
    masked(_x().to(memory_format=torch.channels_last))
    assert seen == [True]


def test_repr_names_kind_and_counts():
    text = repr(dwm.mask_model(_net(), dwm.GumbelSigmoid(), mask_samples=4))
    assert "kind=gumbel-sigmoid, masked_layers=3, masked_weights=510 of 532, mask_samples=4, batch_norm=frozen" in text


def test_another_sampler_may_draw_in_training_and_only_there():
    class Recorder:
        calls = 0

        def sample(self, *args, **kwargs):
            self.calls += 1
            return dwm.ops.sample(*args, **kwargs)

    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(init=0.0), seed=1).train()
    expected = masked(_x())
    masked.rng_state.copy_(torch.tensor([1, 0]))
    recorder = Recorder()
    masked.attach_recorder(recorder)
    assert torch.equal(masked(_x()), expected)
    masked.eval()(_x())
    copy.deepcopy(masked).train()(_x())
    assert recorder.calls == 1
    masked.attach_recorder(None)
    masked.train()(_x())
    assert recorder.calls == 1


def test_the_loop_of_the_readme_learns_a_sparse_mask_that_merges():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    y = (x[:, 0].mean((1, 2)) > 0).long()
    loader = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    masked = dwm.mask_model(_net(), dwm.GumbelSigmoid(tau=1.0, init=2.0), seed=0)
    opt = torch.optim.Adam(masked.mask_parameters(), lr=1e-1)
    before, losses = masked.fraction_kept(), []
    masked.train()
    for _ in range(15):
        for images, labels in loader:
            loss = F.cross_entropy(masked(images), labels) + masked.sparsity_penalty()
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert masked.fraction_kept() < before == 1.0
    plain = dwm.merge(masked.eval())
    assert torch.equal(plain(x), masked(x))


def test_all_layers_that_cannot_be_masked_are_named_at_once_or_skipped():
    net = nn.Sequential(*_set_forward(), nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"'0' has a forward.*'2' has a weight of torch.complex64.*=\['0', '2'\]"):
        dwm.mask_model(net, dwm.Threshold())
    assert list(dwm.mask_model(net, dwm.Threshold(), skip_unmaskable=True).mask_layers()) == ["1"]


def test_a_pattern_of_what_to_leave_out_that_fits_nothing_is_refused():
    with pytest.raises(InputError, match=r"exclude=\['head'\] fits no layer; the model has: 0"):
        dwm.mask_model(nn.Sequential(nn.Linear(2, 2)), dwm.Threshold(), exclude="head")


@pytest.mark.parametrize("wrap", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_leaving_out_a_layer_whose_weight_is_computed_works_as_the_error_says(wrap):
    net = nn.Sequential(wrap(nn.Linear(3, 3)), nn.Linear(3, 2))
    with torch.no_grad():
        net(torch.ones(1, 3))
    with pytest.raises(InputError, match=r"'0' has a computed weight.*exclude=\['0'\]"):
        dwm.mask_model(net, dwm.Threshold(init=1.0))
    masked = dwm.mask_model(net, dwm.Threshold(init=1.0), exclude=["0"])
    assert torch.equal(masked.eval()(torch.ones(1, 3)), net(torch.ones(1, 3)))


@pytest.mark.parametrize("function", [dwm.merge, dwm.pack], ids=lambda f: f.__name__)
def test_a_network_without_masks_is_one_clear_error(function):
    with pytest.raises(InputError, match=f"{function.__name__} got Linear; expected a MaskedModel"):
        function(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", [dwm.GumbelSigmoid(tau=0.5, init=1.5), dwm.Threshold(), dwm.KernelSoft()], ids=repr)
def test_a_model_from_the_meta_device_starts_as_any_other(kind):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 2, 3))
    masked = dwm.mask_model(net, kind, seed=7)
    masked.to_empty(device="cpu")
    with torch.device("cpu"):
        plain = dwm.mask_model(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 2, 3)), kind, seed=7)
    assert torch.equal(masked.rng_state, plain.rng_state)
    assert torch.equal(masked.tau, plain.tau)
    for mine, other in zip(masked.mask_parameters(), plain.mask_parameters(), strict=True):
        assert torch.equal(mine, other)
    assert isinstance(masked.rng_state, torch.Tensor)
    assert "rng_state" in masked.state_dict()


def test_the_last_pass_is_let_go_before_the_next_one_draws():
    """What it kept alive of autograd's graph belongs to another stream, where the next one is captured."""
    masked, before = dwm.mask_model(_net(), dwm.GumbelSigmoid()).train(), []

    class Sampler:
        def sample(self, *args, **kwargs):
            before.append(masked._drawn)
            return dwm.ops.sample(*args, **kwargs)

    masked.attach_recorder(Sampler())
    for _ in range(2):
        masked(_x())
        assert masked._drawn is not None
    assert before == [None, None]
