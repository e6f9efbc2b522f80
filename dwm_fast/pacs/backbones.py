"""The networks of a study, and checkpoints loaded into them layer by layer."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dwm_fast.errors import DataError, InputError

SMALL = "small"
"""Name of the built-in residual network for the procedural images."""


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x), inplace=True)


class SmallResNet(nn.Module):
    """A residual network for images of about 32 pixels: (B, 3, H, W) -> (B, classes).

    Args:
        classes: outputs.
        width: channels of the first of three stages; the others have twice and four times as many.
    """

    def __init__(self, classes: int = 7, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _Block(width, width, 2)
        self.layer2 = _Block(width, 2 * width, 2)
        self.layer3 = _Block(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build_backbone(name: str, classes: int) -> nn.Module:
    """A freshly initialised network: "small", or any torchvision classifier by name.

    Raises InputError for a name that is neither.
    """
    if name == SMALL:
        return SmallResNet(classes)
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = [k for k in known if k.startswith(name[:4])]
        raise InputError(
            f"backbone '{name}' is unknown; expected '{SMALL}' or a torchvision classifier"
            + (f" such as {', '.join(near[:6])}" if near else " such as resnet18, resnet50, vgg16_bn")
        )
    extra = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)
    return network


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave: state_dict names loaded, left at their fresh values, and not used."""

    loaded: list[str]
    fresh: list[str]
    unused: list[str]

    def lines(self) -> list[str]:
        """One line a module: which came from the checkpoint and which starts fresh."""
        modules: dict[str, list[bool]] = {}
        for names, given in ((self.loaded, True), (self.fresh, False)):
            for name in names:
                modules.setdefault(name.rpartition(".")[0], []).append(given)
        words = {True: "from the checkpoint", False: "fresh"}
        return [f"{m}: {words[all(g)] if len(set(g)) == 1 else 'in part'}" for m, g in sorted(modules.items())]


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a torch file that holds tensors only; never unpickles code.

    A nested "state_dict" or "model" entry and the prefix "module." are understood. Raises DataError.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"weights: there is no file {path}; give a .safetensors or .pth file") from error
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"weights: {path} cannot be read as a file of tensors: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        raise DataError(f"weights: {path} holds no state dict; save one with torch.save(model.state_dict(), ...)")
    return {k.removeprefix("module."): v for k, v in found.items() if isinstance(v, Tensor)}


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Load what fits of a checkpoint into `model`, in place; the last layer may have other classes.

    A checkpoint that covers only some layers is accepted and reported. Raises DataError, with `model` as it was,
    when it is of another network: a tensor of another shape outside the last layer, or fewer than half of its
    tensors known.
    """
    given, own = read_checkpoint(path), model.state_dict()
    head = _last_layer(model)
    known = [name for name in given if name in own]
    wrong = [n for n in known if given[n].shape != own[n].shape and n.rpartition(".")[0] != head]
    if wrong or 2 * len(known) < len(given):
        first = next((n for n in given if n not in own), "")
        reason = (
            f"'{wrong[0]}' is {tuple(given[wrong[0]].shape)} there and {tuple(own[wrong[0]].shape)} here"
            if wrong
            else f"only {len(known)} of its {len(given)} tensors are known here ('{first}' is not)"
        )
        raise DataError(f"weights: {path} is of another network: {reason}; choose the backbone it was saved from")
    fitting = [name for name in known if given[name].shape == own[name].shape]
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(given[name])
    return LoadReport(fitting, [n for n in own if n not in set(fitting)], [n for n in given if n not in set(fitting)])


def _last_layer(model: nn.Module) -> str:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
