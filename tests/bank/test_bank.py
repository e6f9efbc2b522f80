"""MaskBank: one domain at a time gives exactly the network with its masks and tensors put in by hand."""

from __future__ import annotations

import copy
import hashlib
import struct
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dwm_fast
from dwm_fast import ops
from dwm_fast.bank import MaskBank, fingerprint, make_domain, pack_signs
from dwm_fast.errors import InputError, MaskFileError

from . import nets

X = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(9))


def by_hand(net: nn.Module, weights: dict[str, Tensor], state: dict[str, Tensor] | None = None) -> nn.Module:
    """A copy of the network with these weights in place, and the state put on modules by name."""
    twin = copy.deepcopy(net)
    for name, tensor in {**weights, **(state or {})}.items():
        path, _, attribute = name.rpartition(".")
        module = twin.get_submodule(path)
        if attribute in module._parameters:
            setattr(module, attribute, nn.Parameter(tensor))
        else:
            module.register_buffer(attribute, tensor)
    return twin


def masked(net: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = dict(net.named_parameters())
    return {name: parameters[name].detach() * mask for name, mask in masks.items()}


def test_a_domain_is_the_network_with_masked_weights_own_head_and_own_batch_norm() -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    masks, state = nets.masks_for(net, 1), nets.state_for(net, 2, classes=7)
    bank.add("sketch", masks, state=state)
    bank.activate("sketch")
    assert torch.equal(bank(X), by_hand(net, masked(net, masks), state)(X))
    bank.activate(None)
    assert torch.equal(bank(X), net(X))


def test_the_backbone_is_never_written_to() -> None:
    net = nets.small_net().train()
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in net.state_dict().items()}
    bank = MaskBank(net)
    bank.add("sketch", nets.masks_for(net, 1), state=nets.state_for(net, 2, 7))
    bank.activate("sketch")
    bank(X)
    bank(X, domains=["sketch"] * 6)
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.data_ptr() == before[name][1]


def test_masks_may_be_named_by_module_or_parameter() -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    masks = nets.masks_for(net, 1)
    bank.add("a", masks)
    bank.add("b", {name.removesuffix(".weight"): mask for name, mask in masks.items()})
    assert torch.equal(bank.record("a").bits, bank.record("b").bits)
    assert bank.info("b").layout.names == nets.MASKED


def test_remove_rename_and_activate_keep_the_bank_consistent() -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    for i, name in enumerate(("a", "b", "c")):
        bank.add(name, nets.masks_for(net, i))
    bank.activate("b")
    expected = bank(X)
    bank.rename("b", "bee")
    assert bank.domains == ["a", "bee", "c"]
    assert bank.active == "bee"
    assert bank.info("bee").domain == "bee"
    assert torch.equal(bank(X), expected)
    bank.remove("bee")
    assert bank.active is None
    assert "bee" not in bank
    assert len(bank) == 2
    assert torch.equal(bank(X), net(X))
    bank.add("bee", nets.masks_for(net, 5))
    bank.activate("bee")
    assert not torch.equal(bank(X), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, m: b.add("a", m), "'a' is in the bank already"),
        (lambda b, m: b.add("../a", m), "cannot name a file"),
        (lambda b, m: b.add("n", {"conv3": m["conv1.weight"]}), "no such weight; did you mean 'conv"),
        (lambda b, m: b.add("n", {"conv2": m["conv1.weight"]}), r"shape \(8, 3, 3, 3\); expected \(12, 8, 3, 3\)"),
        (lambda b, m: b.add("n", {"bn1.running_mean": torch.ones(8).bool()}), "not on a parameter"),
        (lambda b, m: b.add("n", {"conv1": m["conv1.weight"].float()}), "expected torch.bool"),
        (lambda b, m: b.add("n", [m]), "given list; expected a mapping"),
        (lambda b, m: b.add("n", m, state={"head.weight": torch.ones(3)}), "backbone has no such tensor"),
        (lambda b, m: b.activate("zoo"), "'zoo' is not in the bank; it has: a"),
        (lambda b, m: MaskBank(None), "a torch.nn.Module; given a NoneType"),  # type: ignore[arg-type]
        (lambda b, m: MaskBank(dwm_fast.mask_model(b.backbone, dwm_fast.Threshold())), "given a MaskedModel"),
        (lambda b, m: b.remove("zoo"), "'zoo' is not in the bank"),
        (lambda b, m: b.rename("a", "a"), "'a' is in the bank already"),
        (lambda b, m: b(X, domains=["a", "zoo"] * 3), "'zoo' is not in the bank"),
        (lambda b, m: b(X, domains=["a"]), "1 names for a batch of 6"),
        (lambda b, m: b(X, domains=[]), "no domains were named"),
        (lambda b, m: b.overlap(measure="cosine"), "jaccard, and, or, xor"),
        (lambda b, m: b.union([]), "no domains to combine"),
        (lambda b, m: b.save("x", coding="zip"), "raw, coded"),
        (lambda b, m: b.save("x", reference="a"), "needs coding='coded'"),
    ],
)
def test_mistakes_are_refused_with_what_was_expected(call: object, message: str) -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    masks = nets.masks_for(net, 1)
    bank.add("a", masks)
    with pytest.raises((InputError, MaskFileError), match=message):
        call(bank, masks)
    assert bank.domains == ["a"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), p=st.sampled_from([0.0, 0.3, 1.0]))
def test_overlap_union_and_intersection_are_those_of_sets(seed: int, p: float) -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    sets = {}
    for i, name in enumerate("abc"):
        masks = nets.masks_for(net, seed + i, p if name == "a" else 0.5, nets.MASKED[: 3 - (name == "c")])
        bank.add(name, masks)
        full = {n: torch.ones_like(dict(net.named_parameters())[n]).bool() for n in nets.MASKED} | masks
        sets[name] = torch.cat([full[n].flatten() for n in nets.MASKED])
    for measure, count in {
        "and": lambda x, y: (x & y).sum(),
        "or": lambda x, y: (x | y).sum(),
        "xor": lambda x, y: (x ^ y).sum(),
        "jaccard": lambda x, y: (x & y).sum() / (x | y).sum().double() if (x | y).any() else torch.tensor(1.0),
    }.items():
        expected = torch.tensor([[count(sets[x], sets[y]).item() for y in "abc"] for x in "abc"], dtype=torch.float64)
        torch.testing.assert_close(bank.overlap(measure=measure), expected, rtol=0, atol=1e-12, check_dtype=False)
    union = torch.cat([m.flatten() for m in bank.union(["a", "b"]).values()])
    both = torch.cat([m.flatten() for m in bank.intersection().values()])
    assert torch.equal(union, sets["a"] | sets["b"])
    assert torch.equal(both, sets["a"] & sets["b"] & sets["c"])


def test_kernel_masks_spread_over_their_weights() -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    mask = torch.rand(12, 8, 1, 1) < 0.5
    bank.add("kernels", {"conv2": mask})
    assert sum(bank.info("kernels").layout.numels) == 96
    bank.activate("kernels")
    expected = by_hand(net, masked(net, {"conv2.weight": mask}))(X)
    assert torch.equal(bank(X), expected)
    assert torch.equal(bank(X, domains=["kernels"] * 6), expected)
    assert torch.equal(bank.union(["kernels"])["conv2.weight"], mask.expand(12, 8, 3, 3))


@pytest.mark.parametrize("per_zero", [False, True])
@pytest.mark.parametrize("form", ["soft", "edit", "ternary"])
def test_forms_beyond_bits_give_the_weight_of_their_formula(form: str, per_zero: bool) -> None:
    net = nets.small_net()
    weight = net.conv2.weight.detach()
    mask = torch.rand(weight.shape) < 0.5
    full = torch.rand(weight.shape).half()
    full = torch.where(mask, torch.zeros_like(full), full) if per_zero else full
    minus = torch.rand(weight.shape) < 0.5
    values = pack_signs(minus) if form == "ternary" else full[~mask] if per_zero else full.flatten()
    expected = {
        "soft": torch.where(mask, weight, weight * full.float()),
        "edit": weight + full.float(),
        "ternary": weight * mask * (1 - 2 * minus.float()),
    }[form]
    bank = MaskBank(net)
    bank.add("d", {"conv2": mask}, form=form, values={"conv2.weight": values})
    bank.activate("d")
    twin = by_hand(net, {"conv2.weight": expected})
    assert torch.equal(bank(X), twin(X))
    assert torch.equal(bank(X, domains=["d"] * 6), twin(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_domain_of_kept_weights_is_the_same_over_other_weights_and_from_its_file(tmp_path: Path, dtype) -> None:
    net = nets.small_net().to(dtype).to(memory_format=torch.channels_last)
    model = dwm_fast.mask_model(copy.deepcopy(net), dwm_fast.GumbelSigmoid(), exclude=["fc"])
    with torch.no_grad():
        for logits in model.mask_parameters():
            logits.normal_()
    bank = MaskBank(net)
    bank.add("bits", model)
    bank.add("kept", model, form="kept")
    x = X.to(dtype)
    bank.activate("bits")
    expected = bank(x)
    bank.activate("kept")
    assert torch.equal(bank(x), expected)
    assert torch.equal(bank(x, domains=["kept"] * 6), expected)
    assert torch.equal(bank(x, domains=["kept", "bits"] * 3)[::2], bank(x[::2]))
    bank.save(tmp_path, coding="coded")
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name in bank.info("kept").layout.names:
            other.get_parameter(name).fill_(torch.nan)
    loaded = MaskBank.load(tmp_path, other)
    loaded.activate("kept")
    assert torch.equal(loaded(x), expected)
    with pytest.raises(MaskFileError, match="made for other weights"):
        loaded.activate("bits")
    names = bank.info("kept").layout.names
    assert all(v.dtype == dtype for v in loaded.record("kept").values.values())
    assert [v.numel() for v in loaded.record("kept").values.values()] == list(bank.info("kept").ones)
    assert set(loaded.record("kept").values) == set(names)


def test_kept_weights_are_stored_for_binary_masks_of_the_weights_shape_alone(tmp_path: Path) -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    ternary = dwm_fast.mask_model(copy.deepcopy(net), dwm_fast.Threshold(ternary=True))
    with pytest.raises(InputError, match="form='kept' stores what a binary mask keeps; this one has form 'ternary'"):
        bank.add("d", ternary, form="kept")
    kernels = {"conv2": torch.rand(12, 8, 1, 1) < 0.5}
    with pytest.raises(InputError, match=r"'conv2.weight' has shape \(12, 8, 1, 1\); expected \(12, 8, 3, 3\)$"):
        bank.add("d", kernels, form="kept")
    record = make_domain("d", {"conv2.weight": kernels["conv2"]}, form="kept",
                         values={"conv2.weight": torch.zeros(int(kernels["conv2"].sum()))})  # fmt: skip
    with pytest.raises(MaskFileError, match="does not fit the backbone"):
        bank.add_record(record)
    assert not bank.domains


def test_an_active_domain_multiplies_few_rows_of_a_large_weight_by_its_kept_values(monkeypatch) -> None:
    net = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 3))
    bank = MaskBank(net)
    few, many = torch.rand(2048, 2048) < 0.3, torch.rand(2048, 2048) < 0.7
    for name, mask, form in (("few", few, None), ("own", few, "kept"), ("many", many, None)):
        bank.add(name, {"0": mask}, form=form)
    seen: list[int] = []
    product = ops.linear_kept
    monkeypatch.setattr(ops, "linear_kept", lambda x, *rest: seen.append(len(x)) or product(x, *rest))
    x = torch.randn(40, 2048)
    here = ops.backends.chosen("linear_kept", "cpu") == "cpp"
    for name in bank.domains:
        seen.clear()
        bank.activate(name)
        y = bank(x)
        assert torch.equal(bank(x[:4]), bank(x[:4], domains=[name] * 4))
        torch.testing.assert_close(bank(x[:4]), y[:4], rtol=1e-4, atol=1e-4)
        assert bool(seen) == (here and name != "many")
        assert max(seen, default=4) == 4


@pytest.mark.parametrize(
    "kind",
    [
        dwm_fast.GumbelSigmoid(),
        dwm_fast.Threshold(),
        dwm_fast.Threshold(ternary=True),
        dwm_fast.Edit(),
    ],
    ids=["gumbel", "threshold", "ternary", "edit"],
)
def test_a_masked_model_is_added_with_all_that_it_has_of_its_own(kind: dwm_fast.MaskKind) -> None:
    net = nets.small_net()
    model = dwm_fast.mask_model(copy.deepcopy(net), kind, exclude=["fc"])
    with torch.no_grad():
        for logits in model.mask_parameters():
            logits.copy_(torch.randn(logits.shape) * (0.01 if "threshold" in kind.name else 1.0))
        model.model.bn1.running_mean.add_(0.5)
        model.model.conv1.bias.add_(0.25)
        model.model.fc = nn.Linear(20, 9)
    model.eval()
    bank = MaskBank(net)
    bank.add("sketch", model, classes=[str(i) for i in range(9)])
    record = bank.record("sketch")
    assert set(record.state) == {"bn1.running_mean", "conv1.bias", "fc.weight", "fc.bias"}
    assert record.info.method == kind.name
    assert record.info.options == kind.to_dict()
    bank.activate("sketch")
    tolerance = {"rtol": 0, "atol": 2e-2} if kind.name == "edit" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(bank(X), model(X), **tolerance)


def test_one_ulp_in_one_weight_is_another_backbone() -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    bank.add("sketch", nets.masks_for(net, 1))
    record = bank.record("sketch")
    other = nets.small_net()
    MaskBank(other).add_record(record)
    with torch.no_grad():
        flat = other.conv2.weight.view(-1)
        flat[17] = torch.nextafter(flat[17], torch.tensor(torch.inf))
    with pytest.raises(MaskFileError, match=r"backbone: the masks of 'sketch' were made for other weights"):
        MaskBank(other).add_record(record)
    MaskBank(other).add_record(record, allow_other_backbone=True)


def test_fingerprints_follow_the_specification() -> None:
    weights = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(True)}
    flat = {"a": (b"a\0torch.bool\0()\0", [1]), "b": (b"b\0torch.float32\0(3, 2)\0", [0.0, 3.0, 1.0, 4.0, 2.0, 5.0])}
    data = {"a": bytes(flat["a"][1]), "b": struct.pack("<6f", *flat["b"][1])}
    digests = [hashlib.sha256(flat[name][0] + data[name]).digest() for name in "ab"]
    assert fingerprint(weights) == hashlib.sha256(b"".join(digests)).hexdigest()


def test_a_backbone_that_is_changed_after_loading_is_noticed() -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    bank.add("sketch", nets.masks_for(net, 1))
    bank.activate("sketch")
    bank(X)
    with torch.no_grad():
        net.conv1.weight.mul_(1.5)
    with pytest.raises(MaskFileError, match="made for other weights"):
        bank(X)


def test_tied_weights_are_masked_under_all_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(5, 5, bias=False)
            self.decode = nn.Linear(5, 5, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(torch.relu(self.encode(x)))

    net, x = Tied(), torch.randn(4, 5)
    mask = torch.rand(5, 5) < 0.5
    weight = (net.encode.weight * mask).detach()
    expected = torch.relu(x @ weight.T) @ weight.T
    bank = MaskBank(net)
    bank.add("d", {"encode": mask})
    bank.activate("d")
    torch.testing.assert_close(bank(x), expected)
    torch.testing.assert_close(bank(x, domains=["d"] * 4), expected)
    with pytest.raises(InputError, match="second name of a tied one"):
        bank.add("e", {"decode": mask})


def test_masked_weights_that_are_kept_stay_within_the_budget() -> None:
    net = nets.small_net()
    nbytes = sum(4 * mask.numel() for mask in nets.masks_for(net, 0).values())
    bank = MaskBank(net, memory_budget=3 * nbytes)
    for i in range(8):
        bank.add(f"d{i}", nets.masks_for(net, i))
    outputs = []
    for i in range(8):
        bank.activate(f"d{i}")
        outputs.append(bank(X))
        assert bank.hot_nbytes <= 3 * nbytes
    bank.activate("d0")
    assert torch.equal(bank(X), outputs[0])


def test_threads_that_switch_domains_never_see_a_mixture() -> None:
    net = nets.small_net()
    bank = MaskBank(net, memory_budget=20_000)
    names = [f"d{i}" for i in range(4)]
    for i, name in enumerate(names):
        bank.add(name, nets.masks_for(net, i), state=nets.state_for(net, i, 4))
    expected = {}
    for name in names:
        bank.activate(name)
        expected[name] = bank(X)
    wrong: list[str] = []

    def read(offset: int) -> None:
        for i in range(60):
            name = names[(i + offset) % 4]
            if not torch.equal(bank(X, domains=[name] * 6), expected[name]):
                wrong.append(f"mixed {name}")
            bank.activate(name)
            y = bank(X)
            if not any(torch.equal(y, e) for e in expected.values()):
                wrong.append("plain")

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_cast_backbone_keeps_the_fingerprint_of_the_weights_it_came_from() -> None:
    net = nets.small_net()
    record = make_domain("sketch", nets.masks_for(net, 1))
    bank = MaskBank(net)
    bank.add("a", nets.masks_for(net, 1))
    stored = bank.record("a")
    bank.to(torch.float64)
    bank.add_record(make_domain("b", record.masks(), fingerprint=stored.info.fingerprint))
    bank.activate("b")
    assert bank(X.double()).dtype == torch.float64


def test_shown_banks_tell_their_domains() -> None:
    bank = MaskBank(nets.small_net())
    bank.add("sketch", {"conv1": torch.ones(8, 3, 3, 3).bool()})
    assert repr(bank) == "MaskBank(SmallNet on cpu, 1 domains: [sketch], active=None, memory_budget=1,073,741,824)"
