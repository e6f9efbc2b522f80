"""Fine-tune on a second domain while the weights that the first one needs stay as they are, bit for bit."""

import copy

import torch
from learn_a_mask import CLASSES, FEATURES, accuracy, batch
from torch.nn.functional import cross_entropy

import dwm_fast as dwm


def fit(network: torch.nn.Module, optimizer: torch.optim.Optimizer, domain: torch.Tensor, steps: int = 150) -> None:
    for _ in range(steps):
        images, labels = batch(domain)
        optimizer.zero_grad()
        cross_entropy(network.train()(images), labels).backward()
        optimizer.step()


def main() -> tuple[float, float, float]:
    torch.manual_seed(0)
    photo, sketch = torch.randn(2, CLASSES, FEATURES)
    network = torch.nn.Sequential(torch.nn.Linear(FEATURES, 128), torch.nn.ReLU(), torch.nn.Linear(128, CLASSES))
    fit(network, torch.optim.AdamW(network.parameters(), lr=3e-3), photo)

    masked = dwm.mask_model(network, dwm.GumbelSigmoid(init=2.0), seed=0)
    fit(masked, dwm.optim.MaskAdam(masked, lr=0.05, coefficient=0.5), photo)
    keep = masked.keep_masks()  # layer name -> bool tensor, True = keep

    tuned = copy.deepcopy(network)
    frozen = {tuned.get_submodule(name).weight: mask for name, mask in keep.items()}
    fit(tuned, dwm.optim.FrozenAdamW(tuned.parameters(), lr=3e-3, keep=frozen), sketch)

    with torch.no_grad():  # the photo network under its own bits: what was tuned is multiplied by 0
        for name, mask in keep.items():
            assert torch.equal(tuned.get_submodule(name).weight[mask], network.get_submodule(name).weight[mask])
            network.get_submodule(name).weight.copy_(tuned.get_submodule(name).weight * mask)
    results = accuracy(tuned, sketch), accuracy(tuned, photo), accuracy(network, photo)
    print("sketch {:.3f}; photo {:.3f} as one network, {:.3f} under its own bits".format(*results))
    return results


if __name__ == "__main__":
    main()
