"""save_masked and load_masked: no pickle, everything back, one clear line for every broken file."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import dwm_fast as dwm
from dwm_fast.errors import DataError, InputError, MaskFileError

pytestmark = pytest.mark.usefixtures("reference")


def _net(width: int = 6, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


def _x() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _trained(kind: dwm.MaskKind, **settings) -> dwm.MaskedModel:
    masked = dwm.mask_model(_net().to(memory_format=torch.channels_last), kind, seed=3, **settings).train()
    with torch.no_grad():
        for p in masked.mask_parameters():
            p.normal_()
    masked(_x())
    return masked


@pytest.mark.parametrize(
    "kind",
    [
        dwm.GumbelSigmoid(tau=dwm.TauSchedule(2.0, 0.5, 10), init=0.0),
        dwm.Threshold(ternary=True),
        dwm.Edit(threshold=0.7),
        dwm.KernelSoft(),
        dwm.KernelSoft(noisy=True),
    ],
    ids=repr,
)
def test_a_loaded_model_goes_on_where_the_saved_one_stood(tmp_path, kind):
    masked = _trained(kind, mask_samples=2, batch_norm="train", include=["0", "5"])
    dwm.save_masked(masked, tmp_path / "folder" / "model.safetensors")
    given = _net(seed=9).to(memory_format=torch.channels_last)
    before = {k: v.clone() for k, v in given.state_dict().items()}
    loaded = dwm.load_masked(given, tmp_path / "folder" / "model.safetensors")
    assert loaded.kind == kind
    assert (loaded.mask_samples, loaded.batch_norm) == (2, "train")
    assert list(loaded.mask_layers()) == ["0", "5"]
    for name, value in masked.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded.eval()(_x()), masked.eval()(_x()))
    assert torch.equal(loaded.train()(_x()), masked.train()(_x()))
    assert all(torch.equal(before[k], v) for k, v in given.state_dict().items())
    with torch.no_grad():
        loaded.model[0].weight.zero_()
    assert all(torch.equal(before[k], v) for k, v in given.state_dict().items())


def test_layers_of_any_name_and_tied_tensors_are_saved(tmp_path):
    net = nn.ModuleDict(
        {"a*": nn.Linear(2, 2), "ab": nn.Linear(2, 2), "[x],?": nn.Linear(2, 2), "e": nn.Embedding(2, 2)}
    )
    net["ab"].weight = net["e"].weight
    net.forward = lambda x: net["[x],?"](net["a*"](x))
    masked = dwm.mask_model(net, dwm.Threshold(), exclude=["ab"])
    dwm.save_masked(masked, tmp_path / "m.safetensors")
    loaded = dwm.load_masked(net, tmp_path / "m.safetensors")
    assert list(loaded.mask_layers()) == ["a*", "[x],?"]
    assert loaded.model["ab"].weight is loaded.model["e"].weight


def test_the_file_is_safetensors_with_a_readable_header(tmp_path):
    masked = _trained(dwm.GumbelSigmoid())
    dwm.save_masked(masked, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(masked.state_dict())
        about = json.loads(file.metadata()["masked"])
    assert about == {
        "kind": {"kind": "gumbel-sigmoid", "tau": 1.0, "init": 2.0, "hard": True},
        "layers": ["0", "5"],
        "mask_samples": 1,
        "batch_norm": "frozen",
    }


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write"):
        dwm.save_masked(_trained(dwm.Threshold()), tmp_path / "file" / "m.safetensors")


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "m.safetensors"
    dwm.save_masked(_trained(dwm.GumbelSigmoid()), path)
    return path


def _rewrite(path, change) -> None:
    """Write the file again after `change(tensors, header)`."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, path, metadata=header)


def _header(**fields):
    def change(tensors, header):
        header["masked"] = json.dumps({**json.loads(header["masked"]), **fields})

    return change


BROKEN = {
    "no format": (lambda t, h: h.pop("format"), "format is None; expected 'dwm-fast masked model 1'"),
    "other format": (lambda t, h: h.update(format="pt"), "format is 'pt'"),
    "no header": (lambda t, h: h.pop("masked"), "the field 'masked' of the header is broken"),
    "no json": (lambda t, h: h.update(masked="{"), "the field 'masked' of the header is broken"),
    "a list": (lambda t, h: h.update(masked="[]"), "the field 'masked' of the header is broken"),
    "unknown kind": (_header(kind={"kind": "magic"}), "header is broken.*'magic' is unknown"),
    "bad samples": (_header(mask_samples="many"), "header is broken"),
    "no samples": (_header(mask_samples=0), "mask_samples=0"),
    "bad batch norm": (_header(batch_norm="magic"), "batch_norm='magic'"),
    "no layers": (_header(layers=[]), "another network"),
    "other layers": (_header(layers=["0", "fc"]), "it masks 'fc', and the given model has no weight of that name"),
    "a pattern": (_header(layers=["*"]), r"it masks '\*'"),
    "missing tensor": (lambda t, h: t.pop("model.5.bias"), "'model.5.bias' is not in the file"),
    "extra tensor": (lambda t, h: t.update(extra=torch.ones(1)), "'extra' is in the file alone"),
    "wrong type": (
        lambda t, h: t.update(rng_state=torch.ones(2)),
        r"'rng_state' is torch.float32 in the file and torch.int64 in the model",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_clear_line(saved, name):
    change, message = BROKEN[name]
    _rewrite(saved, change)
    with pytest.raises(MaskFileError, match=message) as caught:
        dwm.load_masked(_net(), saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


def test_another_architecture_is_named_by_its_first_difference(saved):
    with pytest.raises(MaskFileError, match=r"'model\.0\.weight' has shape \(6, 3, 3, 3\) in the file and \(7, 3"):
        dwm.load_masked(_net(7), saved)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64, None])
def test_what_is_no_safetensors_file_is_one_clear_line(tmp_path, saved, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(saved.read_bytes()[:-7] if content is None else content)
    with pytest.raises(MaskFileError, match="cannot be read as safetensors"):
        dwm.load_masked(_net(), path)
    with pytest.raises(MaskFileError, match="cannot be read as safetensors"):
        dwm.load_masked(_net(), tmp_path / "missing.safetensors")
    with pytest.raises(MaskFileError, match="cannot be read as safetensors"):
        dwm.load_masked(_net(), tmp_path)


def test_a_wrapped_model_is_saved_under_its_own_names(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    masked = dwm.mask_model(net, dwm.GumbelSigmoid(), seed=0)
    inner = copy.deepcopy(masked)
    inner.model[0] = torch.compile(inner.model[0], backend="eager")
    for number, given in enumerate([torch.compile(masked, backend="eager"), torch.nn.DataParallel(masked), inner]):
        path = tmp_path / f"{number}.safetensors"
        dwm.save_masked(given, path)
        found = dwm.load_masked(torch.compile(net, backend="eager"), path)
        for name, tensor in masked.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)


class Scaled(torch.nn.ReLU):
    def get_extra_state(self):
        return {"scale": 1.0}

    def set_extra_state(self, state):
        pass


def test_a_state_that_is_no_plain_tensor_is_named_and_nothing_is_written(tmp_path):
    sparse = torch.nn.Sequential(torch.nn.Linear(4, 4))
    sparse.register_buffer("adjacency", torch.eye(4).to_sparse())
    cases = [
        (torch.nn.Sequential(torch.nn.Linear(4, 4), Scaled()), r"1._extra_state' .* is dict"),
        (sparse, "adjacency"),
    ]
    for net, message in cases:
        with pytest.raises(InputError, match=message):
            dwm.save_masked(dwm.mask_model(net, dwm.GumbelSigmoid()), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="save_masked got Linear; expected a MaskedModel"):
        dwm.save_masked(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
