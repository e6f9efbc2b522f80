"""Keep one bit per weight per domain, and serve a batch whose samples belong to different domains."""

import tempfile

import torch
from learn_a_mask import CLASSES, FEATURES, batch
from torch.nn.functional import cross_entropy

import dwm_fast as dwm


def main() -> list[float]:
    torch.manual_seed(0)
    domains = {name: torch.randn(CLASSES, FEATURES) for name in ("photo", "art", "sketch")}
    backbone = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 512), torch.nn.ReLU(), torch.nn.Linear(512, CLASSES)
    )  # random and never trained: each domain only chooses weights of it
    bank = dwm.MaskBank(backbone)
    for name, domain in domains.items():
        masked = dwm.mask_model(backbone, dwm.GumbelSigmoid(init=0.0), seed=0)
        optimizer = dwm.optim.MaskAdam(masked, lr=0.1)
        for _ in range(100):
            images, labels = batch(domain)
            optimizer.zero_grad()
            cross_entropy(masked(images), labels).backward()
            optimizer.step()
        bank.add(name, masked)

    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder)
        bank = dwm.MaskBank.load(folder, backbone)
        names = [name for name in domains for _ in range(500)]
        parts = [batch(domain, 500) for domain in domains.values()]
        outputs = bank(torch.cat([images for images, _ in parts]), domains=names)  # one batch, three domains
    found = outputs.argmax(1) == torch.cat([labels for _, labels in parts])
    accuracies = [float(part.float().mean()) for part in found.split(500)]
    print(", ".join(f"{name} {value:.3f}" for name, value in zip(domains, accuracies, strict=True)))
    return accuracies


if __name__ == "__main__":
    main()
