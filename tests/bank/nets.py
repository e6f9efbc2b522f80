"""Small networks for the bank's tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Convolutions, batch norms, a linear layer and a head: (B, 3, 9, 9) -> (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False, padding_mode="circular")
        self.bn2 = nn.BatchNorm2d(12)
        self.hidden = nn.Linear(12, 20)
        self.fc = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.relu(self.hidden(x.mean((2, 3)))))


MASKED = ("conv1.weight", "conv2.weight", "hidden.weight")


def small_net(seed: int = 0) -> SmallNet:
    """A SmallNet in eval mode with fixed weights and lively batch-norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    net = SmallNet().eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.5 if name.endswith("var") else noise * 0.3)
    return net


def masks_for(net: nn.Module, seed: int, p: float = 0.6, names: tuple[str, ...] = MASKED) -> dict[str, Tensor]:
    """Random keep masks for the named parameters."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(net.named_parameters())
    return {name: torch.rand(parameters[name].shape, generator=generator) < p for name in names}


def state_for(net: nn.Module, seed: int, classes: int) -> dict[str, Tensor]:
    """A head of `classes` classes and batch norm values of a domain's own."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "fc.weight": torch.randn(classes, 20, generator=generator),
        "fc.bias": torch.randn(classes, generator=generator),
    }
    for name, tensor in net.state_dict().items():
        if name.startswith("bn") and tensor.is_floating_point():
            state[name] = torch.rand(tensor.shape, generator=generator) + 0.5
    return state
