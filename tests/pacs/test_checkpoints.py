"""Checkpoints as people have them: what can be taken exactly is taken, everything else is refused by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.prune as prune
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dwm_fast.errors import DataError
from dwm_fast.pacs.backbones import SmallResNet, build_backbone, load_weights

State = dict[str, Any]


def small(seed: int = 0) -> SmallResNet:
    torch.manual_seed(seed)
    return SmallResNet(7, width=4)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def saved(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "net.pth")
    return folder / "net.pth"


def old_weight_norm(layer: nn.Module, dim: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer, dim=dim)  # type: ignore[arg-type]


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
    "weight norm": lambda layer: old_weight_norm(layer, 0),
    "weight norm over inputs": lambda layer: old_weight_norm(layer, 1),
    "weight norm over everything": lambda layer: old_weight_norm(layer, None),
    "parametrised weight norm": lambda layer: parametrizations.weight_norm(layer),
    "parametrised weight norm over inputs": lambda layer: parametrizations.weight_norm(layer, dim=1),
}


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_weight_that_is_computed_exactly_is_taken_as_it_is_computed(how: str, wrapper: str, tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    for layer in convolutions(theirs):
        COMPUTED[how](layer)
    path = saved({wrapper + name: value for name, value in theirs.state_dict().items()}, tmp_path)
    report = load_weights(mine, path)
    theirs.eval()(torch.zeros(1, 3, 8, 8))  # hooks compute the weights
    assert report.fresh == report.unused == []
    for a, b in zip(convolutions(mine), convolutions(theirs), strict=True):
        assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("how", ["old", "parametrised"])
def test_a_weight_that_is_computed_in_another_way_is_refused_with_what_to_do(how: str, tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    make = nn.utils.spectral_norm if how == "old" else parametrizations.spectral_norm
    make(theirs.layer1.conv1)  # type: ignore[operator]
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    with pytest.raises(DataError, match=r"computes a weight from 'layer1.conv1\..*remove_parametrizations") as caught:
        load_weights(mine, saved(theirs.state_dict(), tmp_path))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "model", "net", "backbone", "encoder.0"]
ENTRIES = ["state_dict", "model", "model_state_dict", "net", "network", "ema", "state_dict_ema", "model_ema"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WRAPPERS), max_size=3), st.lists(st.sampled_from(ENTRIES), max_size=2), st.booleans())
def test_any_nesting_of_wrapped_names_and_entries_is_loaded_completely(
    tmp_path: Path, wrappers: list[str], entries: list[str], beside: bool
) -> None:
    theirs, mine = small(1), small(2)
    prefix = "".join(f"{wrapper}." for wrapper in wrappers)
    state: State = {prefix + name: value for name, value in theirs.state_dict().items()}
    for entry in entries:
        state = {entry: state}
        if beside:
            state |= {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "lr": torch.tensor(0.1)}
    report = load_weights(mine, saved(state, tmp_path))
    assert report.fresh == report.unused == []
    for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_network_is_taken_before_its_average_and_what_is_unclear_is_named(tmp_path: Path) -> None:
    theirs, average, mine = small(1), small(3), small(2)
    load_weights(mine, saved({"state_dict": theirs.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path))
    assert torch.equal(mine.conv1.weight, theirs.conv1.weight)
    with pytest.raises(DataError, match="holds tensors under 'student', 'teacher', and nothing says which"):
        load_weights(mine, saved({"teacher": theirs.state_dict(), "student": average.state_dict()}, tmp_path))
    state = theirs.state_dict()
    with pytest.raises(DataError, match=r"holds 'conv1\.weight' more than once"):
        load_weights(mine, saved({**state, "module.conv1.weight": state["conv1.weight"]}, tmp_path))


@pytest.mark.parametrize(
    ("larger", "smaller"),
    [("resnet34", "resnet18"), ("densenet169", "densenet121"), ("convnext_small", "convnext_tiny")],
)
def test_a_larger_sibling_is_another_network(larger: str, smaller: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in build_backbone(larger, 7).state_dict().items()}
    model = build_backbone(smaller, 7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match="is of another network: "):
        load_weights(model, saved(state, tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parts_beside_the_network_are_left_and_said(tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    state = {**theirs.state_dict(), "projector.0.weight": torch.ones(3), "queue": torch.ones(2)}
    report = load_weights(mine, saved(state, tmp_path))
    assert report.unused == ["projector.0.weight", "queue"]
    assert report.left_over() == "2 of its tensors were not used: projector, queue"
    assert load_weights(small(2), saved(theirs.state_dict(), tmp_path)).left_over() == ""


def spoiled(value: float, name: str) -> Callable[[State], State]:
    def spoil(state: State) -> State:
        state[name].view(-1)[1] = value
        return state

    return spoil


def quantised(state: State) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {**state, "conv1.weight": torch.quantize_per_tensor(state["conv1.weight"], 0.01, 0, torch.qint8)}


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, "conv1.weight": change(state["conv1.weight"])}


def computed(parts: Callable[[Tensor], State]) -> Callable[[State], State]:
    """conv1.weight made of parts, by the endings of their names."""

    def spoil(state: State) -> State:
        made = parts(state.pop("conv1.weight"))
        return {**state, **{f"conv1.weight{end}": part for end, part in made.items()}}

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoiled(float("nan"), "conv1.weight"), "'conv1.weight' holds 1 values that are not finite"),
        (
            spoiled(float("-inf"), "layer2.bn1.running_var"),
            "'layer2.bn1.running_var' holds 1 values that are not finite",
        ),
        (quantised, "'conv1.weight' is quantised; expected a plain tensor"),
        (changed(lambda w: (100 * w).to(torch.int8)), "'conv1.weight' is torch.int8; expected floating point"),
        (changed(lambda w: w > 0), "'conv1.weight' is torch.bool; expected floating point"),
        (
            changed(lambda w: w.to(torch.float8_e4m3fn)),
            "'conv1.weight' is torch.float8_e4m3fn; expected floating point",
        ),
        (changed(lambda w: w.to(torch.complex64)), "'conv1.weight' is torch.complex64; expected floating point"),
        (changed(lambda w: w.to_sparse()), "'conv1.weight' is torch.sparse_coo; expected a plain tensor"),
        (changed(lambda w: w.double() * 1e300), "'conv1.weight' holds [0-9]+ values .* as torch.float32"),
        (spoiled(-1.0, "bn1.running_var"), "'bn1.running_var' holds a negative variance"),
        (
            computed(lambda w: {"_orig": w, "_mask": torch.ones(3)}),
            r"masks 'conv1.weight' of \(4, 3, 3, 3\) by a mask of \(3,",
        ),
        (
            computed(lambda w: {"": w, "_orig": w, "_mask": w > 0}),
            "holds 'conv1.weight' and 'conv1.weight_orig', of which",
        ),
        (
            computed(lambda w: {"": w, "_g": w[:, :1, :1, :1], "_v": w}),
            "holds 'conv1.weight' and 'conv1.weight_g', of which",
        ),
        (changed(lambda w: w.to("meta")), "'conv1.weight' is on the meta device"),
    ],
)
def test_tensors_that_are_no_finite_weights_are_refused_by_name(
    spoil: Callable[[State], State], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, mine = spoil(dict(small(1).state_dict())), small(2)
    monkeypatch.setattr("dwm_fast.pacs.checkpoints._loaded", lambda path: state)  # meta tensors load as others
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    with pytest.raises(DataError, match=message) as caught:
        load_weights(mine, tmp_path / "net.pth")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.pth")
    for path in (tmp_path / "net.pth", tmp_path):
        with pytest.raises(DataError, match="cannot be read as a file of tensors: it is a folder, a pipe or a device"):
            load_weights(small(), path)
