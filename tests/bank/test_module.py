"""A bank is a torch.nn.Module: mode, moves, state dict, copies and pickles, and `generate`."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwm_fast.bank import MaskBank
from dwm_fast.errors import InputError, MaskFileError

from . import nets


class Writer(nn.Module):
    """Writes by itself, in the style of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.watch: Any = None

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids))

    def generate(self, input_ids: Tensor, *, steps: int = 4) -> Tensor:
        for _ in range(steps):
            input_ids = torch.cat([input_ids, self(input_ids)[:, -1:].argmax(-1)], 1)
            if self.watch is not None:
                self.watch()
        return input_ids


def _bank(net: nn.Module | None = None) -> tuple[nn.Module, MaskBank]:
    net = net or nets.small_net()
    bank = MaskBank(net)
    for seed, domain in enumerate(("sketch", "photo.v2")):
        bank.add(domain, nets.masks_for(net, seed), state=nets.state_for(net, seed, 7), options={"lr": 0.5})
    bank.activate("sketch")
    return net, bank


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def _same(a: MaskBank, b: MaskBank, x: Tensor) -> bool:
    names = (*a.domains, None)
    for name in names:
        a.activate(name)
        b.activate(name)
        if not torch.equal(a(x), b(x)):
            return False
    return sorted(a.domains) == sorted(b.domains) and all(a.info(n) == b.info(n) for n in a.domains)


def test_it_is_a_module_in_eval_mode_that_leaves_its_network_s_mode() -> None:
    net, bank = _bank()
    net.train()
    outer = nn.ModuleDict({"bank": bank})
    for mode in (True, False):
        outer.train(mode)
        assert not bank.training
        assert net.training
    assert bank.eval() is bank
    assert {id(p) for p in bank.parameters()} == {id(p) for p in net.parameters()}
    seen: list[Any] = []
    bank.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(bank(_images(2)), seen[0])


def test_the_state_dict_has_network_and_domains_as_plain_tensors_and_gives_them_back() -> None:
    _, bank = _bank()
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["domains.photo.v2"].dtype == torch.uint8
    fresh = MaskBank(nets.small_net(seed=9))
    result = fresh.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert _same(bank, fresh, _images(3))


def test_a_state_dict_inside_of_another_module_s_finds_its_way_back() -> None:
    outer, other = (nn.ModuleDict({"bank": bank, "more": nn.Linear(2, 2)}) for _, bank in (_bank(), _bank()))
    other["bank"].remove("sketch")  # type: ignore[operator]
    other.load_state_dict(outer.state_dict())
    assert sorted(other["bank"].domains) == ["photo.v2", "sketch"]  # type: ignore[arg-type]


def test_domains_that_a_state_dict_lacks_are_missing_keys_and_stay() -> None:
    _, bank = _bank()
    state = bank.state_dict()
    del state["domains.sketch"]
    with pytest.raises(RuntimeError, match=r"Missing key.*domains\.sketch"):
        bank.load_state_dict(state)
    assert bank.load_state_dict(state, strict=False).missing_keys == ["domains.sketch"]
    assert bank.domains == ["sketch", "photo.v2"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*domain\.x"):
        bank.load_state_dict({**bank.state_dict(), "domain.x": torch.ones(1)})


@pytest.mark.parametrize("fault", ["byte", "name", "dtype"])
def test_a_broken_domain_in_a_state_dict_is_named_and_no_domain_is_taken(fault: str) -> None:
    _, bank = _bank()
    state, before = bank.state_dict(), {name: bank.record(name) for name in bank.domains}
    key = "domains.photo.v2"
    if fault == "byte":
        state[key][-1] ^= 1
    elif fault == "name":
        state["domains.other"] = state.pop(key)
    else:
        state[key] = state[key].float()
    with pytest.raises(RuntimeError, match=r"domains\.(other|photo\.v2)"):
        bank.load_state_dict(state, strict=False)
    assert {name: bank.record(name) for name in bank.domains} == before


def test_a_domain_of_other_weights_in_a_state_dict_is_refused_at_its_use() -> None:
    _, bank = _bank()
    other = MaskBank(nets.small_net(seed=9))
    other.load_state_dict({k: v for k, v in bank.state_dict().items() if k.startswith("domains")}, strict=False)
    with pytest.raises(MaskFileError, match="other weights"):
        other.activate("sketch")


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies_and_pickles_serve_the_same(way: str, tmp_path: Path) -> None:
    net, bank = _bank()
    bank.save(tmp_path)
    loaded = MaskBank.load(tmp_path, net, memory_budget=1 << 20)
    loaded.activate("photo.v2")
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    twin = {
        "deepcopy": lambda: copy.deepcopy(loaded),
        "copy": lambda: copy.copy(loaded),
        "pickle": lambda: pickle.loads(pickle.dumps(loaded)),
        "torch.save": lambda: torch.load(file, weights_only=False),
    }[way]()
    for path in tmp_path.iterdir():
        path.unlink()  # nothing is read there any more
    assert twin.active == "photo.v2"
    assert (twin.backbone is net) == (way == "copy")
    assert _same(bank, twin, _images(3))
    twin.remove("sketch")
    assert "sketch" in loaded


def test_a_moved_bank_and_its_copy_know_their_domains_still() -> None:
    net, bank = _bank()
    bank.double()
    assert next(net.parameters()).dtype == torch.float64
    x = _images(2).double()
    assert torch.equal(copy.deepcopy(bank)(x), bank(x))
    assert bank.to("cpu") is bank
    with pytest.raises(InputError, match="then make the bank"):
        bank.to_empty(device="cpu")


def test_generate_runs_under_the_active_domain_from_start_to_end() -> None:
    net = Writer()
    bank = MaskBank(net)
    masks = {seed: torch.rand(20, 8, generator=torch.Generator().manual_seed(seed)) < 0.4 for seed in (1, 2)}
    for seed, mask in masks.items():
        bank.add(f"d{seed}", {"head": mask})
    ids = torch.arange(6).view(2, 3)
    expected = {}
    for seed, mask in masks.items():
        merged = copy.deepcopy(net)
        merged.head.weight.data *= mask
        expected[seed] = merged.generate(ids, steps=6)
    assert not torch.equal(expected[1], expected[2])
    for seed in masks:
        bank.activate(f"d{seed}")
        assert torch.equal(bank.generate(ids, steps=6), expected[seed])
    bank.activate(None)
    assert torch.equal(bank.generate(ids), net.generate(ids))


def test_a_call_of_the_bank_in_the_middle_of_generate_leaves_it_its_domain() -> None:
    net = Writer()
    bank = MaskBank(net)
    bank.add("a", {"head": torch.rand(20, 8) < 0.4})
    ids = torch.arange(6).view(2, 3)
    bank.activate("a")
    expected = bank.generate(ids)

    def interrupt() -> None:
        bank.activate(None)
        bank(ids)

    net.watch = interrupt
    bank.activate("a")
    assert torch.equal(bank.generate(ids), expected)


def test_a_generate_of_another_domain_in_the_middle_of_one_leaves_it_its_domain() -> None:
    net = Writer()
    bank = MaskBank(net)
    for seed, name in enumerate("ab"):
        bank.add(name, {"head": torch.rand(20, 8, generator=torch.Generator().manual_seed(seed)) < 0.4})
    ids = torch.arange(6).view(2, 3)
    expected = {}
    for name in "ab":
        bank.activate(name)
        expected[name] = bank.generate(ids)
    assert not torch.equal(expected["a"], expected["b"])
    inner = []

    def interrupt() -> None:
        if inner:
            return
        inner.append(ids)  # once, and not within itself
        bank.activate("b")
        inner[0] = bank.generate(ids)
        with pytest.raises(TypeError, match="no_such"):
            bank.generate(ids, no_such=1)

    net.watch = interrupt
    bank.activate("a")
    assert torch.equal(bank.generate(ids), expected["a"])
    assert torch.equal(inner[0], expected["b"])


def test_generate_that_is_not_there_or_of_many_domains_is_one_line() -> None:
    _, bank = _bank()
    with pytest.raises(InputError, match="has no generate"):
        bank.generate(_images(1))
    with pytest.raises(InputError, match="one domain"):
        bank.generate(_images(1), domains=["sketch"])
