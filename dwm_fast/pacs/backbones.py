"""The networks of a study, and checkpoints loaded into them layer by layer."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dwm_fast.errors import DataError, InputError

SMALL = "small"
"""Name of the built-in residual network for the procedural images."""
TORCHVISION = "torchvision"
"""Name, in the place of a checkpoint's path, of the weights that torchvision recommends for the backbone."""


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
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
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
        for name, given in self._named():
            modules.setdefault(name.rpartition(".")[0], []).append(given)
        words = {True: "from the checkpoint", False: "fresh"}
        return [f"{m}: {words[all(g)] if len(set(g)) == 1 else 'in part'}" for m, g in sorted(modules.items())]

    def summary(self) -> str:
        """One line: how many tensors were given, and which parts of the network start fresh."""
        parts: dict[str, list[bool]] = {}
        for name, given in self._named():
            parts.setdefault(name.partition(".")[0], []).append(given)
        fresh = [part if not any(g) else f"{part} (in part)" for part, g in parts.items() if not all(g)]
        flags = [g for _, g in self._named()]
        return f"{sum(flags)} of {len(flags)} tensors; fresh: {', '.join(fresh) or 'nothing'}"

    def _named(self) -> list[tuple[str, bool]]:
        """(name, whether it was given); batch norm's step counters, which many checkpoints lack, say nothing."""
        named = [(name, True) for name in self.loaded] + [(name, False) for name in self.fresh]
        return [(name, given) for name, given in named if not name.endswith("num_batches_tracked")]


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a torch file that holds tensors only; never unpickles code.

    A nested "state_dict" or "model" entry and the prefix "module." are understood. Raises DataError.
    """
    path = Path(path)
    found: Any
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"weights: there is no file {path}; give a .safetensors or .pth file") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights: {path} is no file of tensors alone, and nothing else is unpickled; save one with "
            "torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # bytes that are no pickle fail in as many ways as the unpickler has lines
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"weights: {path} cannot be read as a file of tensors: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        raise DataError(f"weights: {path} holds no state dict; save one with torch.save(model.state_dict(), ...)")
    return {str(k).removeprefix("module."): v for k, v in found.items() if isinstance(v, Tensor)}


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """The weights that torchvision recommends for a classifier, from its cache or the network, checked by hash.

    Raises InputError for a backbone that is not torchvision's, DataError where they cannot be had.
    """
    if name == SMALL:
        raise InputError(f"weights: torchvision has none for the backbone '{SMALL}'; give a file or another backbone")
    import torchvision

    try:
        best = torchvision.models.get_model_weights(name).DEFAULT
        return dict(best.get_state_dict(check_hash=True))
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"weights: torchvision's own for '{name}' cannot be had ({reason}); check the network, or give a file"
        ) from error


def weights_identity(weights: str | Path | None) -> str | None:
    """What tells weights apart wherever their file lies: its SHA-256; a name, or a path without a file, as it is."""
    if weights is None:
        return None
    try:
        with open(weights, "rb") as file:
            return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError:
        return str(weights)


def load_weights(model: nn.Module, weights: str | Path, backbone: str = "") -> LoadReport:
    """Load what fits of a checkpoint into `model`, in place; the last layer may have other classes.

    Args:
        model: the network.
        weights: path of a checkpoint, or "torchvision" for the weights it recommends for `backbone`.
        backbone: the network's name in torchvision.

    A checkpoint that covers only some layers is accepted and reported. Raises DataError, with `model` as it was,
    when it is of another network: a tensor of another shape outside the last layer, or fewer than half of its
    tensors known.
    """
    given = torchvision_weights(backbone) if weights == TORCHVISION else read_checkpoint(weights)
    own = model.state_dict()
    head = _last_layer(model)
    known = [name for name in given if name in own]
    wrong = [n for n in known if given[n].shape != own[n].shape and n.rpartition(".")[0] != head]
    if wrong or not known or 2 * len(known) < len(given):
        first = next((n for n in given if n not in own), "")
        reason = (
            f"'{wrong[0]}' is {tuple(given[wrong[0]].shape)} there and {tuple(own[wrong[0]].shape)} here"
            if wrong
            else f"only {len(known)} of its {len(given)} tensors are known here ('{first}' is not)"
        )
        raise DataError(f"weights: {weights} is of another network: {reason}; choose the backbone it was saved from")
    fitting = [name for name in known if given[name].shape == own[name].shape]
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(given[name])
    return LoadReport(fitting, [n for n in own if n not in set(fitting)], [n for n in given if n not in set(fitting)])


def _last_layer(model: nn.Module) -> str:
    names: list[str] = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return names[-1]
