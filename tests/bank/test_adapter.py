"""A mask adapter: a folder with config, card and mask, that a plain model takes in one line and a bank loads too."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import dwm_fast as dwm
from dwm_fast.bank import MaskAdapter, MaskBank, make_domain
from dwm_fast.errors import InputError, MaskFileError

from . import nets
from .test_hub import _Hub

X = torch.rand(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def _masked(kind: Any = None, **how: Any) -> tuple[nn.Module, Any]:
    net = nets.small_net()
    masked = dwm.mask_model(net, kind or dwm.GumbelSigmoid(init=0.0, spread=1.0), seed=0, **how)
    return net, masked.eval()


@pytest.mark.parametrize(
    "kind",
    [dwm.GumbelSigmoid(init=0.0, spread=1.0), dwm.Threshold(ternary=True, scheme="uniform"), dwm.Edit(spread=1.0)],
)
def test_saved_loaded_and_applied_it_gives_what_the_masked_model_gives(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, masked = _masked(kind)
    MaskAdapter.from_masked(masked, net, "sketch").save_pretrained(tmp_path)
    before = copy.deepcopy(net.state_dict())
    plain = MaskAdapter.from_pretrained(tmp_path).apply(net)
    assert type(plain) is type(net)
    torch.testing.assert_close(plain(X), masked(X), rtol=2**-9, atol=2**-9)  # edits are stored in 16 bits
    assert kind.name == "edit" or torch.equal(plain(X), dwm.merge(masked)(X))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    mine = {t.data_ptr() for t in net.state_dict().values()}
    assert not mine & {t.data_ptr() for t in plain.state_dict().values()}


def test_the_folder_names_base_model_and_masked_layers_and_is_a_bank(tmp_path: Path) -> None:
    net, masked = _masked(exclude="fc")
    net.config = SimpleNamespace(_name_or_path="me/base")  # type: ignore[assignment]
    MaskAdapter.from_masked(masked, net, "sketch").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "README.md",
        "index.json",
        "mask_config.json",
        "sketch.safetensors",
    }
    config = json.loads((tmp_path / "mask_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    assert config["masked_layers"] == ["conv1.weight", "conv2.weight", "hidden.weight"]
    assert (config["domain"], config["mask_type"], config["form"]) == ("sketch", "gumbel-sigmoid", "binary")
    bank = MaskBank.from_pretrained(tmp_path, net)
    bank.activate("sketch")
    assert torch.equal(bank(X), masked(X))


def test_a_domain_s_own_head_and_norms_are_applied_too(tmp_path: Path) -> None:
    net = nets.small_net()
    bank = MaskBank(net)
    state = nets.state_for(net, 3, 7)
    bank.add("seven", nets.masks_for(net, 1), state=state)
    MaskAdapter(bank.record("seven")).save_pretrained(tmp_path)
    adapter = MaskAdapter.from_pretrained(tmp_path)
    assert adapter.config()["modules_to_save"] == sorted(state)
    plain = adapter.apply(net)
    bank.activate("seven")
    assert torch.equal(plain.eval()(X), bank(X))
    assert plain.fc.out_features == 7
    with torch.no_grad():
        plain.fc.weight.zero_()
    assert torch.equal(adapter.record.state["fc.weight"], state["fc.weight"])


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    net = Tied()
    masked = dwm.mask_model(net, dwm.GumbelSigmoid(init=0.0, spread=1.0), tied="share", seed=0).eval()
    plain = MaskAdapter.from_masked(masked, net).apply(net)
    assert plain.a.weight is plain.b.weight
    assert torch.equal(plain(torch.ones(1, 4)), masked(torch.ones(1, 4)))


def test_another_model_is_refused_unless_it_is_asked_for() -> None:
    net, masked = _masked()
    adapter = MaskAdapter.from_masked(masked, net)
    with pytest.raises(MaskFileError, match="other weights"):
        adapter.apply(nets.small_net(seed=5))
    adapter.apply(nets.small_net(seed=5), allow_other_backbone=True)
    with pytest.raises(MaskFileError, match="does not fit"):
        adapter.apply(nn.Linear(2, 2))
    with pytest.raises(InputError, match="other weights"):
        MaskAdapter.from_masked(masked, nets.small_net(seed=5))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"masked_layers": ["fc.weight"]}, "masked_layers"),
        ({"fraction_kept": 0.9}, "fraction_kept"),
        ({"format": "peft"}, "version"),
        ({"domain": "../up"}, "domain"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"domain": "photo"}, "photo"),
    ],
)
def test_a_config_that_lies_is_an_error_that_names_the_field(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    net, masked = _masked()
    MaskAdapter.from_masked(masked, net).save_pretrained(tmp_path)
    path = tmp_path / "mask_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MaskFileError, match=field):
        MaskAdapter.from_pretrained(tmp_path)


def test_a_folder_without_a_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(MaskFileError, match=r"mask_config\.json"):
        MaskAdapter.from_pretrained(tmp_path)


def test_the_card_is_yaml_and_text_whatever_the_names_are_and_one_that_is_there_stays(tmp_path: Path) -> None:
    record = make_domain("a", {"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    for base in ("me/base", "me/base\n---\n# <script>", "`x`", ""):
        card = MaskAdapter(record, base, "Net`<b>").card()
        _, front, text = card.split("---\n", 2)
        assert yaml.safe_load(front).get("base_model") == ("me/base" if base == "me/base" else None)
        assert "<b>" not in text
        assert "script" not in text
    (tmp_path / "README.md").write_text("mine")
    MaskAdapter(record).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_it_goes_to_the_hub_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(tmp_path))
    net, masked = _masked()
    MaskAdapter.from_masked(masked, net, "sketch", base_model_name_or_path="me/base").push_to_hub("me/sketch")
    names = {path.name for path in (tmp_path / "me/sketch").iterdir()}
    assert names == {"sketch.safetensors", "index.json", "mask_config.json", "README.md"}
    adapter = MaskAdapter.from_pretrained("me/sketch")
    assert adapter.base_model_name_or_path == "me/base"
    assert torch.equal(adapter.apply(net)(X), masked(X))
