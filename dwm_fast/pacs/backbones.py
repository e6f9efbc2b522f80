"""The networks of a study, and checkpoints loaded into them layer by layer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.checkpoints import check_values, fitted, read_checkpoint

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


def last_linear(model: nn.Module) -> str:
    """Name of the network's last Linear, its head, of which every domain may have its own.

    Raises InputError for a network that ends in something else.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    last = next(reversed(layers), "")
    if not isinstance(layers.get(last), nn.Linear):
        raise InputError(
            f"{type(model).__name__} does not end in a Linear layer, of which every domain would get its own; choose "
            "another --backbone, such as resnet18"
        )
    return last


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

    def left_over(self) -> str:
        """One line on what of the checkpoint was not used; empty where all of it was."""
        parts = list(dict.fromkeys(name.partition(".")[0] for name in self.unused))
        return f"{len(self.unused)} of its tensors were not used: {', '.join(parts)}" if parts else ""

    def _named(self) -> list[tuple[str, bool]]:
        """(name, whether it was given); batch norm's step counters, which many checkpoints lack, say nothing."""
        named = [(name, True) for name in self.loaded] + [(name, False) for name in self.fresh]
        return [(name, given) for name, given in named if not name.endswith("num_batches_tracked")]


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
    if not os.path.isfile(weights):  # a pipe would be waited for
        return str(weights)
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
    when it is of another network (a tensor of another shape outside the last layer, tensors inside a part of this one
    that has no place for them, or fewer than half of its tensors known), and for tensors that `checkpoints` refuses.
    """
    own = model.state_dict()
    head = _last_layer(model)
    read = torchvision_weights(backbone) if weights == TORCHVISION else read_checkpoint(weights)
    given = fitted(read, own, str(weights))
    known = [name for name in given if name in own]
    fitting = [name for name in known if given[name].shape == own[name].shape]
    reason = _of_another_network(given, own, known, head)
    if reason:
        raise DataError(f"weights: {weights} is of another network: {reason}; choose the backbone it was saved from")
    check_values({name: given[name] for name in fitting}, own, str(weights))
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(given[name])
    return LoadReport(fitting, [n for n in own if n not in set(fitting)], [n for n in given if n not in set(fitting)])


def _of_another_network(given: Mapping[str, Tensor], own: Mapping[str, Tensor], known: list[str], head: str) -> str:
    """Why the tensors are not this network's; empty where they are."""
    wrong = [n for n in known if given[n].shape != own[n].shape and n.rpartition(".")[0] != head]
    if wrong:
        return f"'{wrong[0]}' is {tuple(given[wrong[0]].shape)} there and {tuple(own[wrong[0]].shape)} here"
    if not known or 2 * len(known) < len(given):
        first = next((n for n in given if n not in own), "")
        return f"only {len(known)} of its {len(given)} tensors are known here ('{first}' is not)"
    inside = [name for name in given if name not in own and _inside(name, own, head)]
    if inside:
        return f"'{inside[0]}' and {len(inside) - 1} more of its tensors have no place here, as in a larger network"
    return ""


def _inside(name: str, own: Iterable[str], head: str) -> bool:
    """Whether a tensor unknown here belongs to a part of the network that is known: 'layer1.2.conv1' beside 'layer1.1'.

    Not so the parts of the head, which is another one anyway, and counters that say nothing.
    """
    first = name.partition(".")[0]
    parts = {one.partition(".")[0] for one in own}
    stem = first.rstrip("0123456789")
    sibling = stem != first and any(part.rstrip("0123456789") == stem for part in parts)
    return (first in parts or sibling) and first != head.partition(".")[0] and not name.endswith("num_batches_tracked")


def _last_layer(model: nn.Module) -> str:
    names: list[str] = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return names[-1]
