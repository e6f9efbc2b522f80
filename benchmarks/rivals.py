"""What one writes without this library: masks in plain PyTorch, layer by layer."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gumbel_mask(logits: Tensor, tau: float = 1.0) -> Tensor:
    """Hard Gumbel-sigmoid mask with the soft one's gradient (straight-through), as textbooks write it."""
    u = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
    soft = torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / tau)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


class EagerMaskedLinear(nn.Linear):
    """nn.Linear whose weight is multiplied by a fresh mask in every forward."""

    mask_logits: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * gumbel_mask(self.mask_logits), self.bias)


class EagerMaskedConv2d(nn.Conv2d):
    """nn.Conv2d whose weight is multiplied by a fresh mask in every forward."""

    mask_logits: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, self.weight * gumbel_mask(self.mask_logits), self.bias)
        return out


class EagerPackedLinear(nn.Linear):
    """nn.Linear that unpacks the bits of its mask in every forward."""

    bits: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * unpacked(self.bits, self.weight.shape), self.bias)


class EagerPackedConv2d(nn.Conv2d):
    """nn.Conv2d that unpacks the bits of its mask in every forward."""

    bits: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, self.weight * unpacked(self.bits, self.weight.shape), self.bias)
        return out


def eager_masked(model: nn.Module, init: float = 2.0) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the network with eager masked layers, and its logits, the only trainable parameters."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    logits = []
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.__class__ = EagerMaskedConv2d if isinstance(module, nn.Conv2d) else EagerMaskedLinear
            learned = nn.Parameter(torch.full_like(module.get_parameter("weight"), init))
            module.register_parameter("mask_logits", learned)
            logits.append(learned)
    return model, logits


def eager_penalty(logits: list[nn.Parameter]) -> Tensor:
    """Mean keep probability over all layers."""
    total = sum(x.numel() for x in logits)
    return torch.stack([torch.sigmoid(x).sum() for x in logits]).sum() / total


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """Bits as a bool mask, by shifts and comparisons."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    lanes = (bits.unsqueeze(1) >> shifts) & 1
    return lanes.reshape(-1)[: shape.numel()].view(shape).bool()


def packed(mask: Tensor) -> Tensor:
    """A bool mask as bits, padded to whole bytes, by shifts and a sum."""
    flat = mask.reshape(-1)
    lanes = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (lanes << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)
