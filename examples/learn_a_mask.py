"""Learn which weights of a trained network a domain needs, and bake the mask into an ordinary network."""

import torch
from torch.nn.functional import cross_entropy

import dwm_fast as dwm

CLASSES, FEATURES = 4, 64


def batch(prototypes: torch.Tensor, size: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A domain: noisy copies of one vector a class."""
    labels = torch.randint(CLASSES, (size,))
    return 0.3 * prototypes[labels] + torch.randn(size, FEATURES), labels


def accuracy(network: torch.nn.Module, prototypes: torch.Tensor) -> float:
    images, labels = batch(prototypes, 4096)
    return float((network.eval()(images).argmax(1) == labels).float().mean())


def main() -> tuple[float, float, float]:
    torch.manual_seed(0)
    domain = torch.randn(CLASSES, FEATURES)
    network = torch.nn.Sequential(torch.nn.Linear(FEATURES, 128), torch.nn.ReLU(), torch.nn.Linear(128, CLASSES))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(100):
        images, labels = batch(domain)
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()

    masked = dwm.mask_model(network, dwm.GumbelSigmoid(init=2.0), seed=0)  # the weights are frozen and shared
    mask_optimizer = dwm.optim.MaskAdam(masked, lr=0.05, coefficient=0.5)  # coefficient: how dearly a weight is paid
    for _ in range(200):
        images, labels = batch(domain)
        mask_optimizer.zero_grad()
        cross_entropy(masked(images), labels).backward()
        mask_optimizer.step()

    before, after, kept = accuracy(network, domain), accuracy(dwm.merge(masked), domain), masked.fraction_kept()
    print(f"accuracy {before:.3f} with all weights, {after:.3f} with {kept:.0%} of them")
    return before, after, kept


if __name__ == "__main__":
    main()
