"""Small networks and tasks that the tests of the methods learn in a moment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast.methods import SourceTask, Task

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


class ConvNet(nn.Module):
    """Two convolutions with batch norm, then a linear layer: (B, 3, 6, 6) -> (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def conv_net(seed: int = 0) -> ConvNet:
    """A ConvNet whose batch norm has statistics and affine parameters of its own."""
    torch.manual_seed(seed)
    net = ConvNet()
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


def image_batches(count: int = 3, size: int = 8, device: str = "cpu") -> Batches:
    """Epoch number -> `count` batches of noise with random labels, the same at every call."""

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(number + 7)
        for _ in range(count):
            images = 2 * torch.randn(size, 3, 6, 6, generator=generator) + 1
            labels = torch.randint(4, (size,), generator=generator)
            yield images.to(device), labels.to(device)

    return epoch


INPUTS, USED = 24, 4
"""The label of a vector depends on its first USED of INPUTS numbers."""


def _vectors(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, INPUTS, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] + x[:, 3] > 0).long()


def vector_batches(number: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(number + 100)
    for _ in range(20):
        yield _vectors(generator, 64)


def trained_mlp() -> nn.Module:
    """A network that solves the toy task of vectors; most of its weights are of no use."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(INPUTS, 48), nn.ReLU(), nn.Linear(48, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for epoch in range(8):
        for x, y in vector_batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def vector_task(seed: int = 0, progress: Callable[..., None] = lambda _: None) -> SourceTask:
    """The toy task as a method sees it."""
    x, y = _vectors(torch.Generator().manual_seed(1), 1024)

    @torch.no_grad()
    def loss(network: nn.Module) -> float:
        return float(F.cross_entropy(network.eval()(x), y))

    return SourceTask(batches=vector_batches, steps_per_epoch=20, loss=loss, seed=seed, progress=progress)


def under_mask(model: nn.Module, keep: dict[str, Tensor]) -> nn.Module:
    """A copy of `model` with the weights that are not kept set to 0."""
    masked = copy.deepcopy(model)
    for name, mask in keep.items():
        masked.get_submodule(name).weight.data[~mask] = 0.0
    return masked.eval()


def conv_maker(classes: int) -> nn.Module:
    """A fresh ConvNet with another number of classes."""
    net = ConvNet()
    net.fc = nn.Linear(8, classes)
    return net


def image_task(name: str, classes: int = 4, seed: int = 0, steps: int = 3) -> Task:
    """Noise with random labels, of its own for every name."""
    shift = sum(map(ord, name)) % 97

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * shift + epoch)
        for _ in range(steps):
            images = torch.randn(8, 3, 6, 6, generator=generator) + shift / 97
            yield images, torch.randint(classes, (8,), generator=generator)

    @torch.no_grad()
    def loss(network: nn.Module) -> float:
        images, labels = next(batches(99))
        return float(F.cross_entropy(network.eval()(images), labels))

    return Task(name, classes, batches, steps, loss, seed)


def images_for_tests() -> Tensor:
    """A batch that ConvNets take."""
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(5))
