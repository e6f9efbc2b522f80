"""Processes that save a bank again and again until they are killed.

Version v of a save holds two domains with the masks `masks(v)`; they belong together.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dwm_fast.bank import MaskBank

SIZE = 300


def backbone() -> nn.Module:
    """The same weights in every process."""
    net = nn.Sequential(nn.Linear(SIZE, 40), nn.ReLU(), nn.Linear(40, 4))
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) % 17 * 0.1 + i)
    return net


def masks(version: int) -> dict[str, Tensor]:
    """Masks from which the version can be read back."""
    generator = torch.Generator().manual_seed(version)
    mask = torch.rand(40, SIZE, generator=generator) < 0.5
    mask[0, :32] = (version >> torch.arange(32)) & 1 == 1
    return {"0.weight": mask}


def version_of(found: dict[str, Tensor]) -> int:
    """The version that made these masks; they have to be exactly its masks."""
    version = int((found["0.weight"][0, :32].long() << torch.arange(32)).sum())
    assert torch.equal(found["0.weight"], masks(version)["0.weight"])
    return version


def save(folder: Path, who: str, version: int) -> None:
    """Save domains `who`-a and `who`-b of one version."""
    bank = MaskBank(backbone())
    for letter in "ab":
        bank.add(f"{who}-{letter}", masks(version))
    bank.save(folder, coding="coded" if version % 2 else "raw", reference=f"{who}-a" if version % 2 else None)


def serve() -> None:
    """For every line "FOLDER WHO VERSION" on stdin, fork a process that saves rising versions until it is killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, who, version = line.split()
        pid = os.fork()
        if pid == 0:
            for number in range(int(version) + 1, 1 << 30):
                save(Path(folder), who, number)
                print("saved", number, flush=True)
        print("pid", pid, flush=True)


if __name__ == "__main__":
    serve()
