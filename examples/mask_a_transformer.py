"""Masks of a transformer: learn them in some layers only, and store one bit per masked weight."""

import tempfile
from pathlib import Path

import torch
import torchvision
from torch.nn.functional import cross_entropy

import dwm_fast as dwm


def main() -> tuple[list[float], int, int]:
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=2
    )
    masked = dwm.mask_model(network, dwm.Threshold(), include=["*.mlp.*"])  # Piggyback's rule, in the MLPs only
    masked.model.heads.requires_grad_(True)  # the head learns too
    optimizer = torch.optim.Adam([p for p in masked.parameters() if p.requires_grad], lr=1e-3)

    losses = []
    labels = torch.arange(2).repeat(32)
    images = torch.randn(64, 3, 32, 32) + labels.view(-1, 1, 1, 1)  # brighter images are class 1
    for _ in range(20):
        loss = cross_entropy(masked(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    weights = sum(layer.weight.numel() for layer in masked.mask_layers().values())
    with tempfile.TemporaryDirectory() as folder:
        bank = dwm.MaskBank(network)
        bank.add("bright", masked)
        bank.save(folder)
        nbytes = (Path(folder) / "bright.safetensors").stat().st_size
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {weights} masked weights and the head in {nbytes} bytes")
    return losses, weights, nbytes


if __name__ == "__main__":
    main()
