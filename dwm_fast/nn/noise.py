"""What a masked layer or model starts from: the state of the noise contract, and the temperature."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.nn.kinds import MaskKind


def new_rng_state(seed: int | None, device: torch.device | str | None = None) -> Tensor:
    """Seed and step for the noise contract, int64 (2,); the seed comes from torch's generator when None.

    A seed is 64 bits: any number from -2^63 to 2^64 - 1, where s and s - 2^64 are the same seed.
    """
    if seed is None:
        seed = int(torch.randint(0, 2**62, (), device="cpu"))
    try:
        number = operator.index(seed)
    except TypeError:
        raise InputError(f"seed={seed!r}; expected a whole number, or None for one from torch's generator") from None
    if not -(2**63) <= number < 2**64:
        raise InputError(f"seed={seed}; expected a 64-bit number, from -2^63 to 2^64 - 1")
    signed = number - 2**64 if number >= 2**63 else number
    return torch.tensor([signed, 0], dtype=torch.int64, device=device)


def new_tau(kind: MaskKind, device: torch.device | str | None) -> Tensor:
    """The kind's first temperature, 0-dim fp32."""
    return torch.tensor(float(kind.initial_tau), dtype=torch.float32, device=device)
