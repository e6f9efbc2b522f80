"""Masks learned by several processes: the same as by one, whatever their number.

Three gloo processes on the CPU, started once: two of them and all of them learn under DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import dwm_fast as dwm
from dwm_fast.optim import MaskAdam, reduced

ROWS, STEPS = 12, 20
PAGE = Path(__file__).parents[2] / "docs/distributed.md"


def _masked(**options: Any) -> dwm.MaskedModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    kind = dwm.GumbelSigmoid(tau=dwm.LinearSchedule(1.0, 0.5, STEPS), init=0.5)
    return dwm.mask_model(net, kind, seed=0, **options)


class Learning:
    """A masked model and MaskAdam on the rows of one rank; parts: backward passes of a step, the last one synced.

    With `ddp` DistributedDataParallel averages the gradients, else MaskAdam does; `clip`: the norm, None for no look.
    """

    def __init__(self, masked: dwm.MaskedModel, group: Any = None, ddp: bool = True) -> None:
        self.masked = masked
        averages = group if not ddp else None
        self.optimizer = MaskAdam(masked, lr=0.05, coefficient=2.0, process_group=averages)
        self.rank, self.ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self.call = DistributedDataParallel(masked, process_group=group) if group is not None and ddp else masked
        self.drawn: list[Tensor] = []

    def run(self, first: int, last: int, parts: int = 1, clip: float | None = 1.0) -> Learning:
        for i in range(first, last):
            self.optimizer.zero_grad()
            for part in range(parts):
                x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(parts * i + part))
                mine = slice(self.rank * ROWS // self.ranks, (self.rank + 1) * ROWS // self.ranks)
                waits = part + 1 < parts and isinstance(self.call, DistributedDataParallel)
                with self.call.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                    self.masked.observe(self._keep)
                    F.cross_entropy(self.call(x[mine]), torch.arange(ROWS)[mine] % 4).backward()
            if clip is not None:
                self.optimizer.reduce_gradients()
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


def _told(ask: Callable[[], object]) -> str:
    try:
        return repr(ask())
    except dwm.InputError as error:
        return str(error)


def _of_many_sorts() -> list[Tensor]:
    """More than one message, in two dtypes and a memory format; small whole numbers, so means of two are exact."""
    images = torch.arange(96.0).view(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    return [torch.ones(5, dtype=torch.bfloat16), torch.arange(8.0), images, torch.tensor(4.0), torch.empty(0, 3)]


def _averaged(rank: int, two: Any) -> dict[str, Any]:
    """What two ranks find where MaskAdam averages, and no DDP does."""
    found: dict[str, Any] = {
        "folded": Learning(_masked(), two, ddp=False).run(0, STEPS, clip=None).found(),
        "clipped": Learning(_masked(), two, ddp=False).run(0, STEPS).found(),
        "folded, accumulated": Learning(_masked(), two, ddp=False).run(0, 6, parts=3).found(),
    }
    own = _masked(noise="per-rank", process_group=two)
    found["own noise of two"] = Learning(own, two, ddp=False).run(0, STEPS).found()
    found |= _disagreeing(rank, two)
    mesh = DeviceMesh.from_group(two, "cpu")
    found["a copy's"] = Learning(copy.deepcopy(own), mesh.get_group(), ddp=False).run(0, 1).drawn[0]
    found["the next"] = Learning(own, two).run(0, 1).drawn[0]
    sent, all_reduce = [], dist.all_reduce
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "all_reduce", lambda x, **how: sent.append(x.numel()) or all_reduce(x, **how))
        spent = Learning(_masked(), two, ddp=False).run(0, 1, clip=None)
        Learning(_masked(), two, ddp=False).run(0, 1, parts=3, clip=None)
    found["sent"] = sent
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reduced, "BUCKET_BYTES", 40)
        found["means"] = reduced.mean_over_ranks([t * (rank + 1) for t in _of_many_sorts()], two)
    found["spent"] = _told(lambda: next(spent.masked.mask_parameters()).grad + 0)  # type: ignore[operator]
    found["looked"] = _told(lambda: _backward(Learning(_masked(), two, ddp=False)).grad + 0)  # type: ignore[operator]
    late = Learning(_masked(), two, ddp=False)
    _backward(late)
    late.optimizer.reduce_gradients()
    found["under DDP"] = _told(lambda: _backward(_wrapped(Learning(_masked(), two, ddp=False), two)))
    found["late"] = _told(lambda: _backward(late))
    late.optimizer.zero_grad()
    found["not late"] = _told(lambda: _backward(late))
    moved = _masked()
    with torch.no_grad():
        next(moved.mask_parameters())[3, 5] += 1e-6 * rank
    found["logits differ"] = _told(lambda: MaskAdam(moved, process_group=two))
    torch.manual_seed(rank)
    seeded = dwm.mask_model(nn.Linear(4, 4), dwm.Threshold(), seed=rank)
    found["seeds and weights differ"] = _told(lambda: dwm.nn.check_ranks(seeded, mesh))
    torch.manual_seed(0)
    other = dwm.mask_model(nn.Linear(4, 4), dwm.Threshold(threshold=0.001 * rank), seed=0)
    found["rates differ"] = _told(lambda: MaskAdam(_masked(), lr=0.1 * (1 + rank), process_group=two))
    found["kinds differ"] = _told(lambda: dwm.nn.check_ranks(other, two))
    return found


def _own_step(learning: Learning, passes: int = 1, penalty: bool = False) -> Tensor:
    """A step from backward passes over rows of this rank's own; the logits after it."""
    for i in range(passes):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * learning.rank + i))
        loss = learning.masked(x).square().mean()
        (loss + learning.masked.sparsity_penalty() if penalty else loss).backward()
    learning.optimizer.step()
    return learning.logits()


def _disagreeing(rank: int, two: Any) -> dict[str, Any]:
    """Steps that were given up, and ranks that come to one with other gradients than their peers."""
    skipped, later = Learning(_masked(), two, ddp=False), Learning(_masked(), two, ddp=False)
    _backward(skipped)
    skipped.optimizer.reduce_gradients()
    skipped.masked.zero_grad()  # as where a norm was not finite
    later.masked.noise = "per-rank"
    passes = Learning(_masked(), two, ddp=False)
    found: dict[str, Any] = {
        "after a step given up": _own_step(skipped),
        "noise set later": _own_step(later),
        "other passes": _told(lambda: _own_step(passes, passes=1 + rank)),
        "other losses": _told(lambda: _own_step(Learning(_masked(), two, ddp=False), penalty=rank == 1)),
        "no rows": _told(lambda: _own_step(Learning(_masked(), two, ddp=False), passes=1 - rank)),
        "left alone": torch.equal(passes.logits(), _masked_logits()) and passes.optimizer.state == {},
    }
    torch.manual_seed(rank)
    edited = dwm.mask_model(nn.Linear(16, 4), dwm.Edit(), seed=0)
    DistributedDataParallel(edited, process_group=two)
    return {**found, "units": _told(lambda: dwm.nn.check_ranks(edited, two))}


def _masked_logits() -> Tensor:
    return Learning(_masked()).logits()


def _wrapped(learning: Learning, group: Any) -> Learning:
    learning.call = DistributedDataParallel(learning.masked, process_group=group)
    return learning


def _backward(learning: Learning) -> Tensor:
    learning.call(torch.ones(2, 16)).sum().backward()
    return next(learning.masked.mask_parameters())


def _resumed(state: dict[str, Any], group: Any = None, ddp: bool = True) -> Learning:
    learning = Learning(_masked(), group, ddp)
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
            found |= _averaged(rank, two)
        else:
            found["not in"] = _told(lambda: _masked(noise="per-rank", process_group=two))
        dist.barrier()
        state = torch.load(f"{folder}/half.pt")
        found["resumed"] = _resumed(state, three).run(STEPS // 2, STEPS).found()
        found["resumed, averaged"] = _resumed(state, three, ddp=False).run(STEPS // 2, STEPS).found()
        found["own noise"] = Learning(_masked(noise="per-rank"), three).run(0, STEPS).found()
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    if rank < 2:
        _run_the_page(rank, folder)


def _run_the_page(rank: int, folder: str) -> None:
    """The script of the page as two processes of torchrun run it, but for the address at which they meet."""
    script = PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    init, meet = dist.init_process_group, f"file://{folder}/page"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RANK", str(rank))
        patched.setattr(dist, "init_process_group", lambda way: init(way, init_method=meet, rank=rank, world_size=2))
        patched.chdir(folder)
        exec(compile(script, str(PAGE), "exec"), {"__name__": "__main__"})


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


CASES = [
    ("two", 1, STEPS, 1.0),
    ("accumulated", 3, 6, 1.0),
    ("folded", 1, STEPS, None),
    ("clipped", 1, STEPS, 1.0),
    ("folded, accumulated", 3, 6, 1.0),
]


@pytest.mark.parametrize(("what", "parts", "steps", "clip"), CASES)
def test_two_ranks_learn_what_one_process_learns_from_the_whole_batch(
    ranks: Any, what: str, parts: int, steps: int, clip: float | None
) -> None:
    alone = Learning(_masked()).run(0, steps, parts=parts, clip=clip).found()
    start = Learning(_masked()).logits()
    assert (alone["logits"] - start).abs().max() > 0.1
    for rank in ranks[:2]:
        assert torch.equal(rank[what]["drawn"], ranks[0][what]["drawn"])  # masks, bit for bit
        assert torch.equal(rank[what]["drawn"], alone["drawn"])
        assert torch.equal(rank[what]["logits"], ranks[0][what]["logits"])
        _same(rank[what]["logits"], alone["logits"])


def test_a_step_averages_the_gradients_of_masked_weights_once_and_stays_folded(ranks: Any) -> None:
    weights = 16 * 16 + 16 * 4
    for rank in ranks[:2]:
        # One draw, and three of a step, with all layers in one message after one of two numbers: do the ranks agree?
        assert rank["sent"] == [2, weights, 2, weights]
        assert "went into the last step of MaskAdam" in rank["spent"]
        assert "of this rank alone; call optimizer.reduce_gradients()" in rank["looked"]
        assert "let DistributedDataParallel leave the logits out" in rank["under DDP"]
        assert "backward() came after reduce_gradients()" in rank["late"]
        assert rank["not late"].startswith("Parameter")


def test_after_a_step_given_up_the_next_one_is_averaged(ranks: Any) -> None:
    assert not torch.equal(ranks[0]["after a step given up"], _masked_logits())
    for what in ("after a step given up", "noise set later"):
        assert torch.equal(ranks[0][what], ranks[1][what])


def test_ranks_with_other_gradients_than_their_peers_are_told_so_and_nothing_is_stepped(ranks: Any) -> None:
    for rank in ranks[:2]:
        for what in ("other passes", "other losses", "no rows"):
            assert rank[what].startswith("ranks have other gradients to average than each other")
        assert rank["left alone"]
    assert "2 have that of one backward pass, 0 a sum" in ranks[0]["other passes"]
    assert "0 have that of one backward pass, 2 a sum" in ranks[1]["other passes"]
    assert "one backward pass and the penalty's" in ranks[1]["other losses"]
    assert "2 none" in ranks[1]["no rows"]


def test_a_mean_over_ranks_keeps_dtypes_and_memory_formats(ranks: Any) -> None:
    for rank in ranks[:2]:
        for found, one in zip(rank["means"], _of_many_sorts(), strict=True):
            assert (found.dtype, found.stride()) == (one.dtype, one.stride())
            assert torch.equal(found, one * 1.5)


def test_the_script_of_the_page_runs_in_two_processes(ranks: Any, folder: Path) -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    assert 0.02 < dwm.load_masked(net, folder / "masked.safetensors").fraction_kept() < 0.5


def test_ranks_with_other_values_are_told_so_and_which(ranks: Any) -> None:
    for rank in ranks[:2]:
        assert rank["logits differ"].startswith(
            "ranks 1 start from other values than rank 0 in 'model.0.mask_logits': give"
        )
        assert "in 'rng_state', 'model.weight', 'model.bias': give" in rank["seeds and weights differ"]
        assert rank["rates differ"].startswith("ranks 1 give MaskAdam other options than rank 0; this one {'lr': 0.")
        assert rank["kinds differ"].startswith("ranks 1 hold another model than rank 0")
        assert "in 'model.unit': give" in rank["units"]  # DDP gave weights, not what was measured on them
    assert "a group that this process is not in" in ranks[2]["not in"]


def test_the_ranks_of_a_smaller_group_are_its_mask_samples(ranks: Any) -> None:
    alone = Learning(_masked(mask_samples=2)).run(0, STEPS).found()
    for r, rank in enumerate(ranks[:2]):
        assert torch.equal(rank["own noise of two"]["drawn"], alone["drawn"][r::2])
        assert torch.equal(rank["own noise of two"]["rng"], alone["rng"])
        _same(rank["own noise of two"]["logits"], alone["logits"])
        assert torch.equal(rank["a copy's"], rank["the next"])
    assert not torch.equal(ranks[0]["the next"], ranks[1]["the next"])


def test_what_two_ranks_saved_goes_on_with_one_and_with_three(ranks: Any, folder: Path) -> None:
    alone = Learning(_masked()).run(0, STEPS).found()
    _same(_resumed(torch.load(folder / "half.pt")).run(STEPS // 2, STEPS).logits(), alone["logits"])
    for rank, how in itertools.product(ranks, ("resumed", "resumed, averaged")):
        assert torch.equal(rank[how]["logits"], ranks[0][how]["logits"])
        assert torch.equal(rank[how]["drawn"], alone["drawn"][STEPS // 2 :])
        _same(rank[how]["logits"], alone["logits"])


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


def test_one_process_agrees_with_itself() -> None:
    assert dwm.nn.check_ranks(_masked()) is None  # type: ignore[func-returns-value]


def test_noise_is_one_of_two_and_is_kept_in_files(tmp_path: Path) -> None:
    with pytest.raises(dwm.InputError, match="noise='own'; expected 'shared' or 'per-rank'"):
        _masked(noise="own")
    with pytest.raises(dwm.InputError, match="noise='per-rank' with memory='streamed'"):
        dwm.mask_model(nn.Linear(4, 4), dwm.GumbelSigmoid(), memory="streamed", noise="per-rank")
    with pytest.raises(dwm.InputError, match="process_group with noise='shared'"):
        _masked(process_group="two")
    with pytest.raises(dwm.InputError, match="process_group is a str; expected a torch"):
        _masked(noise="per-rank", process_group="two")
    with pytest.raises(dwm.InputError, match="process_group is a str"):
        MaskAdam(_masked(), process_group="two")
    masked = dwm.mask_model(nn.Linear(4, 4), dwm.GumbelSigmoid(), noise="per-rank")
    dwm.save_masked(masked, tmp_path / "x.safetensors")
    assert dwm.load_masked(nn.Linear(4, 4), tmp_path / "x.safetensors").noise == "per-rank"
