"""Learn a mask in several processes: torchrun --nproc-per-node 2 examples/data_parallel.py (or plain python: one)."""

import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dwm_fast as dwm


def main() -> float:
    several = "RANK" in os.environ  # torchrun sets it
    if several:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)  # the same network everywhere
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).to(device)
    masked = dwm.mask_model(net, dwm.GumbelSigmoid(init=1.0), noise="per-rank")
    call = DistributedDataParallel(masked) if several else masked
    opt = dwm.optim.MaskAdam(masked, lr=0.1, coefficient=1.0)

    images = torch.randn(256, 32, generator=torch.Generator().manual_seed(1)).to(device)
    labels = images[:, :4].argmax(1)
    for step in range(20):
        start = step * 64 % 256
        mine = slice(start + rank * 64 // ranks, start + (rank + 1) * 64 // ranks)  # each rank a part of the batch
        opt.zero_grad()
        cross_entropy(call(images[mine]), labels[mine]).backward()
        opt.step()

    if rank == 0:
        print(f"{ranks} processes: {masked.fraction_kept():.2f} of the weights kept")
        dwm.save_masked(masked, "masked.safetensors")  # loads in any number of processes
    kept = masked.fraction_kept()
    if several:
        dist.destroy_process_group()
    return kept


if __name__ == "__main__":
    main()
