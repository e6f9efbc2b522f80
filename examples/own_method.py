"""A method of your own: keep the weights with the largest Taylor score on the source, abs(weight * gradient)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from learn_a_mask import CLASSES, FEATURES, batch
from torch.nn.functional import cross_entropy

from dwm_fast.methods import FoundMask, SourceTask
from dwm_fast.nn import maskable_weights


@dataclass(frozen=True)
class Taylor:
    fraction: float = 0.3
    name: ClassVar[str] = "taylor"

    def find(self, model: torch.nn.Module, task: SourceTask) -> FoundMask:
        model.zero_grad()
        for images, labels in task.batches(0):
            cross_entropy(model(images), labels).backward()
        scores = {name: (w.weight * w.weight.grad).abs() for name, w in maskable_weights(model).items()}
        limit = torch.cat([s.flatten() for s in scores.values()]).quantile(1 - self.fraction)
        model.zero_grad()
        return FoundMask(keep={name: score >= limit for name, score in scores.items()})


def main() -> float:
    torch.manual_seed(0)
    domain = torch.randn(CLASSES, FEATURES)
    network = torch.nn.Sequential(torch.nn.Linear(FEATURES, 128), torch.nn.ReLU(), torch.nn.Linear(128, CLASSES))

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (batch(domain) for _ in range(4))

    def loss(model: torch.nn.Module) -> float:
        images, labels = batch(domain)
        return float(cross_entropy(model(images), labels))

    task = SourceTask(batches=batches, steps_per_epoch=4, loss=loss)
    found = Taylor().find(network, task)
    print(f"{found.fraction_kept:.1%} kept: {found.counts()}")
    return found.fraction_kept


if __name__ == "__main__":
    main()
