"""Networks of the cases, with random weights: speed does not depend on what they have learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NAMES = ("resnet18", "resnet50", "vit_b_16", "mlp4096")
CLASSES = 7


def network(name: str, device: torch.device) -> nn.Module:
    """One of NAMES with 7 classes in eval mode; convolutional ones are channels_last on a GPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp4096":
            hidden = [layer for _ in range(4) for layer in (nn.Linear(4096, 4096), nn.ReLU())]
            return nn.Sequential(*hidden, nn.Linear(4096, CLASSES)).to(device).eval()
        import torchvision

        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES).to(device).eval()
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" and "resnet" in name else model


def batch(name: str, rows: int, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random inputs and labels for a network of NAMES."""
    labels = torch.randint(0, CLASSES, (rows,), device=device)
    if name == "mlp4096":
        return torch.randn(rows, 4096, device=device), labels
    images = torch.randn(rows, 3, pixels, pixels, device=device)
    if device.type == "cuda" and "resnet" in name:
        images = images.to(memory_format=torch.channels_last)
    return images, labels


@dataclass(frozen=True)
class Tensors:
    """Everything that sampling the masks of one network takes."""

    logits: list[Tensor]
    weights: list[Tensor]
    rng_state: Tensor
    tau: Tensor

    @property
    def count(self) -> int:
        return sum(w.numel() for w in self.weights)


def mask_tensors(name: str, device: torch.device, keep: float = 2.0, spread: float = 2.0) -> Tensors:
    """The weights of every Linear and Conv2d, logits ~ N(keep, spread), seed 7, step 0, tau 1."""
    weights = [
        m.weight.detach().clone() for m in network(name, device).modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    generator = torch.Generator(device=device).manual_seed(1)
    logits = [torch.empty_like(w).normal_(keep, spread, generator=generator) for w in weights]
    state = torch.tensor([7, 0], device=device)
    return Tensors(logits, weights, state, torch.tensor(1.0, device=device))
