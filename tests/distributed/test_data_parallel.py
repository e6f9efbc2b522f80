"""Masks learned by several processes: the same as by one, whatever their number.

Three gloo processes on the CPU, started once: two of them and all of them learn under DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dwm_fast as dwm
from dwm_fast.optim import MaskAdam

ROWS, STEPS = 12, 20


def _masked(**options: Any) -> dwm.MaskedModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    kind = dwm.GumbelSigmoid(tau=dwm.LinearSchedule(1.0, 0.5, STEPS), init=0.5)
    return dwm.mask_model(net, kind, seed=0, **options)


class Learning:
    """A masked model and MaskAdam on the rows of one rank; parts: backward passes of a step, the last one synced."""

    def __init__(self, masked: dwm.MaskedModel, group: Any = None) -> None:
        self.masked = masked
        self.optimizer = MaskAdam(masked, lr=0.05, coefficient=2.0)
        self.rank, self.ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self.call = DistributedDataParallel(masked, process_group=group) if group is not None else masked
        self.drawn: list[Tensor] = []

    def run(self, first: int, last: int, parts: int = 1, clip: float = 1.0) -> Learning:
        for i in range(first, last):
            self.optimizer.zero_grad()
            for part in range(parts):
                x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(parts * i + part))
                mine = slice(self.rank * ROWS // self.ranks, (self.rank + 1) * ROWS // self.ranks)
                waits = part + 1 < parts and isinstance(self.call, DistributedDataParallel)
                with self.call.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                    self.masked.observe(self._keep)
                    F.cross_entropy(self.call(x[mine]), torch.arange(ROWS)[mine] % 4).backward()
            nn.utils.clip_grad_norm_(self.masked.mask_parameters(), clip)
            self.optimizer.step()
        return self

    def _keep(self, weights: list[Tensor]) -> None:
        self.drawn.append(torch.cat([w.flatten() for w in weights]) != 0)

    def state(self) -> dict[str, Any]:
        return {"model": self.masked.state_dict(), "optimizer": self.optimizer.state_dict()}

    def logits(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.masked.mask_parameters()])

    def found(self) -> dict[str, Tensor]:
        return {"logits": self.logits(), "drawn": torch.stack(self.drawn), "rng": self.masked.rng_state.clone()}


def _resumed(state: dict[str, Any], group: Any = None) -> Learning:
    learning = Learning(_masked(), group)
    learning.masked.load_state_dict(state["model"])
    learning.optimizer.load_state_dict(state["optimizer"])
    return learning


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    try:
        found: dict[str, Any] = {}
        two, three = dist.new_group([0, 1]), dist.new_group([0, 1, 2])
        if rank < 2:
            half = Learning(_masked(), two).run(0, STEPS // 2)
            if rank == 0:
                torch.save(half.state(), f"{folder}/half.pt")
            dcp.save({"model": half.masked.state_dict()}, checkpoint_id=f"{folder}/dcp", process_group=two)
            found["two"] = half.run(STEPS // 2, STEPS).found()
            found["accumulated"] = Learning(_masked(), two).run(0, 6, parts=3).found()
        dist.barrier()
        state = torch.load(f"{folder}/half.pt")
        found["resumed"] = _resumed(state, three).run(STEPS // 2, STEPS).found()
        found["own noise"] = Learning(_masked(noise="per-rank"), three).run(0, STEPS).found()
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as made:
        torch.multiprocessing.spawn(_rank, (made,), nprocs=3)
        yield Path(made)


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def _same(found: Tensor, expected: Tensor) -> None:
    """Rounding alone: sums in another order differ by 2^-24 of their terms, of which the smallest gradients here are
    2^-10, so by 2^-14 of themselves; Adam makes of it at most that share of a step of 0.05, and there are 20 steps."""
    torch.testing.assert_close(found, expected, rtol=0, atol=20 * 0.05 * 2.0**-14)


@pytest.mark.parametrize(("what", "parts", "steps"), [("two", 1, STEPS), ("accumulated", 3, 6)])
def test_two_ranks_learn_what_one_process_learns_from_the_whole_batch(
    ranks: Any, what: str, parts: int, steps: int
) -> None:
    alone = Learning(_masked()).run(0, steps, parts=parts).found()
    start = Learning(_masked()).logits()
    assert (alone["logits"] - start).abs().max() > 0.1
    for rank in ranks[:2]:
        assert torch.equal(rank[what]["drawn"], ranks[0][what]["drawn"])  # masks, bit for bit
        assert torch.equal(rank[what]["drawn"], alone["drawn"])
        assert torch.equal(rank[what]["logits"], ranks[0][what]["logits"])
        _same(rank[what]["logits"], alone["logits"])


def test_what_two_ranks_saved_goes_on_with_one_and_with_three(ranks: Any, folder: Path) -> None:
    alone = Learning(_masked()).run(0, STEPS).found()
    _same(_resumed(torch.load(folder / "half.pt")).run(STEPS // 2, STEPS).logits(), alone["logits"])
    for rank in ranks:
        assert torch.equal(rank["resumed"]["logits"], ranks[0]["resumed"]["logits"])
        assert torch.equal(rank["resumed"]["drawn"], alone["drawn"][STEPS // 2 :])
        _same(rank["resumed"]["logits"], alone["logits"])


def test_a_distributed_checkpoint_of_two_ranks_is_read_by_one_process(folder: Path) -> None:
    saved = torch.load(folder / "half.pt")["model"]
    masked = _masked()
    state = masked.state_dict()
    dcp.load({"model": state}, checkpoint_id=folder / "dcp", no_dist=True)
    masked.load_state_dict(state)
    assert all(torch.equal(value, saved[name]) for name, value in masked.state_dict().items())


def test_ranks_with_noise_of_their_own_are_the_mask_samples_of_one_process(ranks: Any) -> None:
    alone = Learning(_masked(mask_samples=3)).run(0, STEPS).found()
    for r, rank in enumerate(ranks):
        assert torch.equal(rank["own noise"]["drawn"], alone["drawn"][r::3])
        assert torch.equal(rank["own noise"]["rng"], alone["rng"])
        assert torch.equal(rank["own noise"]["logits"], ranks[0]["own noise"]["logits"])
        _same(rank["own noise"]["logits"], alone["logits"])
    first, second = (rank["own noise"]["drawn"] for rank in ranks[:2])
    assert not torch.equal(first[0], second[0])


def test_noise_is_one_of_two_and_is_kept_in_files(tmp_path: Path) -> None:
    with pytest.raises(dwm.InputError, match="noise='own'; expected 'shared' or 'per-rank'"):
        _masked(noise="own")
    with pytest.raises(dwm.InputError, match="noise='per-rank' with memory='streamed'"):
        dwm.mask_model(nn.Linear(4, 4), dwm.GumbelSigmoid(), memory="streamed", noise="per-rank")
    masked = dwm.mask_model(nn.Linear(4, 4), dwm.GumbelSigmoid(), noise="per-rank")
    dwm.save_masked(masked, tmp_path / "x.safetensors")
    assert dwm.load_masked(nn.Linear(4, 4), tmp_path / "x.safetensors").noise == "per-rank"
