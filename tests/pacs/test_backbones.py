"""Networks by name, and checkpoints that give all, a part or nothing of one."""

from __future__ import annotations

import os
import pickle
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.backbones import SmallResNet, build_backbone, load_weights, read_checkpoint

WEIGHTS = Path(os.environ.get("DWM_FAST_WEIGHTS", Path(__file__).parents[3] / "shared" / "data" / "weights"))
PARTIAL = WEIGHTS / "resnet18_conv1_to_layer3_imagenet.safetensors"


def small(classes: int = 7, seed: int = 0) -> SmallResNet:
    torch.manual_seed(seed)
    return SmallResNet(classes, width=4)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["small", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet"])
def test_backbones_by_name_have_the_classes_asked_for(name: str) -> None:
    model = build_backbone(name, 5).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "'resnet19' is unknown; expected 'small' or a torchvision classifier such as resnet101, resnet1"),
        ("alexnett", "such as alexnet"),
        ("nonsense", "such as resnet18, resnet50, vgg16_bn"),
        ("", "backbone '' is unknown"),
        ("fcn_resnet50", "backbone 'fcn_resnet50' is unknown"),
    ],
)
def test_an_unknown_backbone_is_named_with_near_ones(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_backbone(name, 7)


def as_is(state: dict[str, Tensor]) -> Any:
    return state


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": as_is,
    "nested state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "nested model": lambda state: {"model": state},
    "data parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "half precision": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_torch_file_is_loaded_completely(form: str, tmp_path: Path) -> None:
    saved, model = small(seed=1), small(seed=2)
    torch.save(FORMS[form](saved.state_dict()), tmp_path / "net.pth")
    report = load_weights(model, tmp_path / "net.pth")
    assert (report.fresh, report.unused) == ([], [])
    tolerance = 1e-3 if form == "half precision" else 0
    for mine, theirs in zip(model.state_dict().values(), saved.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_safetensors_are_loaded_with_and_without_a_prefix(tmp_path: Path) -> None:
    for prefix in ("", "module."):
        saved, model = small(seed=1), small(seed=2)
        save_file({prefix + name: value for name, value in saved.state_dict().items()}, tmp_path / "net.safetensors")
        load_weights(model, str(tmp_path / "net.safetensors"))
        assert unchanged(model, snapshot(saved))


def test_a_partial_checkpoint_is_reported_layer_by_layer(tmp_path: Path) -> None:
    saved, model = small(seed=1), small(seed=2)
    fresh = snapshot(model)
    part = {k: v for k, v in saved.state_dict().items() if not k.startswith(("fc", "layer3")) and k != "bn1.bias"}
    torch.save({**part, "head.extra": torch.zeros(2)}, tmp_path / "part.pth")
    report = load_weights(model, tmp_path / "part.pth")
    assert set(report.loaded) == set(part)
    assert report.unused == ["head.extra"]
    assert sorted(report.loaded + report.fresh) == sorted(fresh)
    lines = report.lines()
    assert "conv1: from the checkpoint" in lines
    assert "fc: fresh" in lines
    assert "bn1: in part" in lines
    given, total = (sum("num_batches" not in name for name in names) for names in (part, fresh))
    assert report.summary() == f"{given} of {total} tensors; fresh: bn1 (in part), layer3, fc"
    for name, value in model.state_dict().items():
        assert torch.equal(value, part.get(name, fresh[name])), name


def test_a_head_of_other_classes_stays_fresh(tmp_path: Path) -> None:
    model = small(classes=7, seed=2)
    head = model.fc.weight.clone()
    torch.save(small(classes=1000, seed=1).state_dict(), tmp_path / "net.pth")
    report = load_weights(model, tmp_path / "net.pth")
    assert report.fresh == report.unused == ["fc.weight", "fc.bias"]
    assert torch.equal(model.fc.weight, head)
    assert report.summary().endswith("fresh: fc")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SmallResNet(7, width=6), r"'conv1.weight' is \(6, 3, 3, 3\) there and \(4, 3, 3, 3\) here"),
        (nn.Sequential(nn.Linear(2, 2)), r"only 0 of its 2 tensors are known here \('0.weight' is not\)"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_and_the_model_untouched(
    other: nn.Module, message: str, tmp_path: Path
) -> None:
    model = small()
    before = snapshot(model)
    torch.save(other.state_dict(), tmp_path / "net.pth")
    with pytest.raises(DataError, match=f"net.pth is of another network: {message}; choose the backbone") as caught:
        load_weights(model, tmp_path / "net.pth")
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)


class Bomb:
    """Pickled code: what it names would run while it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["DWM_FAST_BOMB"],)


def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWM_FAST_BOMB", str(tmp_path / "exploded"))
    torch.save({"state_dict": small().state_dict(), "extra": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save(small(), tmp_path / "module.pth")
    for name in ("bomb.pth", "bare.pth", "module.pth"):
        with pytest.raises(DataError, match=f"{name} is no file of tensors alone, and nothing else is unpickled") as e:
            load_weights(small(), tmp_path / name)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    save_file({}, tmp_path / "none.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello hello hello")
    good = tmp_path / "good.pth"
    torch.save(small().state_dict(), good)
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:-500])
    for name, message in {
        "nowhere.pth": "there is no file",
        "nowhere.safetensors": "there is no file",
        "list.pth": "holds no state dict",
        "numbers.pth": "holds no state dict",
        "none.safetensors": "holds no state dict",
        "text.pth": "no file of tensors|cannot be read",
        "empty.pth": "no file of tensors|cannot be read",
        "text.safetensors": "cannot be read",
        "cut.pth": "cannot be read",
        ".": "cannot be read",
    }.items():
        with pytest.raises(DataError, match=f"weights: .*({message})") as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value), name


class TestTorchvisionsOwn:
    def give(self, monkeypatch: pytest.MonkeyPatch, get_state_dict: Callable[..., Any]) -> None:
        class Best:
            DEFAULT = type("Weights", (), {"get_state_dict": staticmethod(get_state_dict)})

        monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: asked.append(name) or Best)
        asked.clear()

    def test_the_recommended_ones_are_loaded_and_checked_by_hash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(1)
        full = build_backbone("squeezenet1_1", 1000)
        hashes = []
        self.give(monkeypatch, lambda check_hash: hashes.append(check_hash) or full.state_dict())
        model = build_backbone("squeezenet1_1", 7)
        report = load_weights(model, "torchvision", "squeezenet1_1")
        assert (asked, hashes) == (["squeezenet1_1"], [True])
        assert report.fresh == ["classifier.1.weight", "classifier.1.bias"]
        assert torch.equal(model.state_dict()["features.0.weight"], full.state_dict()["features.0.weight"])

    @pytest.mark.parametrize(
        "error",
        [
            urllib.error.URLError("Name or service not known"),
            RuntimeError('invalid hash value (expected "b8", got "77")\nmore'),
            OSError(28, "No space left on device"),
        ],
    )
    def test_a_failed_download_is_one_line(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(check_hash: bool) -> None:
            raise error

        self.give(monkeypatch, fail)
        with pytest.raises(DataError, match=r"torchvision's own for 'resnet18' cannot be had .*network") as caught:
            load_weights(small(), "torchvision", "resnet18")
        assert "\n" not in str(caught.value)

    def test_the_small_network_has_none(self) -> None:
        with pytest.raises(InputError, match="torchvision has none for the backbone 'small'"):
            load_weights(small(), "torchvision", "small")


asked: list[str] = []


@pytest.mark.realdata
@pytest.mark.skipif(not PARTIAL.is_file(), reason=f"no {PARTIAL.name}; name its folder in DWM_FAST_WEIGHTS")
def test_the_given_partial_weights_leave_layer4_and_head_fresh() -> None:
    model = build_backbone("resnet18", 7)
    before = snapshot(model)
    report = load_weights(model, PARTIAL)
    assert report.unused == []
    assert report.summary().endswith("of 102 tensors; fresh: layer4, fc")
    assert not torch.equal(model.state_dict()["layer3.0.conv1.weight"], before["layer3.0.conv1.weight"])
    assert torch.equal(model.state_dict()["layer4.0.conv1.weight"], before["layer4.0.conv1.weight"])
