"""FSDP2 (fully_shard) over masked models, whole and by layers: it trains as one process would.

Three gloo processes on the CPU, started once for all tests of this file; two of them, or all, are a mesh.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import dwm_fast as dwm
from dwm_fast.optim import FrozenAdamW, FrozenSGD, MaskAdam

STEPS, ROWS, RATE = 3, 8, 4.0


class _Net(nn.Module):
    """A linear layer, run again in the backward pass by a checkpoint; a host of masks (Conv1d); a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(16, 16), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=False).relu()
        return self.last(self.middle(x[:, None])[:, 0])  # type: ignore[no-any-return]


def _masked(**options: Any) -> dwm.MaskedModel:
    return dwm.mask_model(_Net(), dwm.GumbelSigmoid(init=0.0), seed=0, **options)


PARTS = ("first", "middle", "last")


def _by_layers(
    mesh: Any, whole: bool, parts: tuple[str, ...] = PARTS, masked: dwm.MaskedModel | None = None
) -> dwm.MaskedModel:
    """Each part sharded by itself; `whole`: what is left of the model too, with its shards gathered by the root."""
    masked = masked or _masked()
    for part in parts:
        fully_shard(masked.model.get_submodule(part), mesh=mesh)
    return fully_shard(masked, mesh=mesh) if whole else masked


def _train(masked: dwm.MaskedModel, rows: slice) -> tuple[dwm.MaskedModel, Tensor]:
    """The model after some steps, and which weights each of them kept."""
    x, y = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1))[rows], torch.arange(ROWS)[rows] % 4
    optimizer = torch.optim.SGD(masked.mask_parameters(), lr=RATE)
    drawn: list[Tensor] = []
    masked.observe(lambda weights: drawn.append(torch.cat([w.detach().flatten() for w in weights]) != 0))
    for _ in range(STEPS):
        optimizer.zero_grad()
        (F.cross_entropy(masked(x), y) + masked.sparsity_penalty()).backward()
        optimizer.step()
    return masked, torch.stack(drawn)


def _logits(state: dict[str, Any]) -> Tensor:
    return torch.cat([value.flatten() for name, value in state.items() if name.endswith("mask_logits")])


def _refusals(mesh: Any, masked: dwm.MaskedModel, folder: str) -> dict[str, Callable[[], object]]:
    """What is asked for by name; each has to be an InputError on every rank."""

    def a_mask_alone() -> object:
        own = _masked()
        fully_shard(own.model.middle.get_submodule("masked_weight"), mesh=mesh)
        return own(torch.ones(1, 16))

    def the_penalty_alone() -> object:
        own = _by_layers(mesh, whole=True)
        own(torch.ones(1, 16))
        own.sparsity_penalty().backward()
        return own

    def made_before() -> object:
        own = _masked()
        MaskAdam(own)
        fully_shard(own, mesh=mesh)
        return own(torch.ones(1, 16))

    def weights_alone() -> object:
        own = _masked()
        logits = set(own.mask_parameters())
        fully_shard(own.model.first, mesh=mesh, ignored_params=logits)
        with pytest.raises(dwm.InputError, match="a draw of masks needs whole tensors"):
            own(torch.ones(1, 16))
        return MaskAdam(own)

    return {
        "a draw of masks needs whole": a_mask_alone,
        "the penalty of a layer that was sharded by itself": the_penalty_alone,
        "other tensors than when MaskAdam was made": made_before,
        "let fully_shard have both": weights_alone,
        "keep_masks needs whole": masked.fraction_kept,
        "sparsity_penalty needs whole": masked.sparsity_penalty,
        "save_masked needs whole": lambda: dwm.save_masked(masked, f"{folder}/x.safetensors"),
        "merge needs whole": lambda: dwm.merge(masked),
        "pack needs whole": lambda: dwm.pack(masked),
        "mask_model needs whole": lambda: dwm.mask_model(fully_shard(_Net(), mesh=mesh), dwm.Threshold()),
    }


def _learned(masked: dwm.MaskedModel, rows: slice) -> dict[str, Any]:
    masked, drawn = _train(masked, rows)
    state = get_model_state_dict(masked, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        after = masked.eval()(torch.ones(1, 16))
    return {"logits": _logits(state) if state else None, "drawn": drawn, "eval": after}


class Learning:
    """A masked model and MaskAdam on the rows of one rank, clipped; whole without a mesh, else sharded by layers."""

    def __init__(self, mesh: Any = None, compiled: bool = False, **options: Any) -> None:
        self.masked = _masked(**options)
        self.call = torch.compile(self.masked, backend="eager") if compiled else self.masked
        if mesh is not None:
            _by_layers(mesh, whole=True, parts=PARTS[:2], masked=self.masked)
            with torch.no_grad():
                self.masked.eval()(torch.ones(1, 16))  # leaves the root's parameters whole
            self.masked.train()
        self.optimizer = MaskAdam(self.masked, lr=0.05, coefficient=2.0)
        self.rank, self.ranks = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)

    def run(self, first: int, last: int) -> Learning:
        for i in range(first, last):
            x = torch.randn(12, 16, generator=torch.Generator().manual_seed(i))
            mine = slice(self.rank * 12 // self.ranks, (self.rank + 1) * 12 // self.ranks)
            self.optimizer.zero_grad()
            F.cross_entropy(self.call(x[mine]), torch.arange(12)[mine] % 4).backward()
            nn.utils.clip_grad_norm_(self.masked.mask_parameters(), 0.005)
            self.optimizer.step()
        return self

    def save(self, folder: str, group: Any) -> Learning:
        model, optimizer = get_state_dict(self.masked, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=f"{folder}/half", process_group=group)
        return self

    def load(self, folder: str, no_dist: bool = False) -> Learning:
        model, optimizer = get_state_dict(self.masked, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=f"{folder}/half", no_dist=no_dist)
        set_state_dict(self.masked, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        return self

    def logits(self) -> Tensor:
        return torch.cat([_whole(p.detach()).flatten() for p in self.masked.mask_parameters()])


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


FROZEN: dict[str, Callable[..., Any]] = {
    "AdamW": partial(FrozenAdamW, lr=0.1),
    "AdamW, compact": partial(FrozenAdamW, lr=0.1, compact=True),
    "SGD": partial(FrozenSGD, lr=0.1, momentum=0.9),
    "SGD, compact": partial(FrozenSGD, lr=0.1, momentum=0.9, compact=True),
}


def _keep() -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(3)
    return {n: torch.rand(p.shape, generator=noise) < 0.5 for n, p in _Net().named_parameters() if p.dim() > 1}


def _tuned(how: str, mesh: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after three steps of a frozen optimiser over a plain network, and its state."""
    net = _Net()
    if mesh is not None:
        fully_shard(net.first, mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = FROZEN[how](net.named_parameters(), keep=_keep())
    rank, ranks = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    for i in range(3):
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(i))
        mine = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        optimizer.zero_grad()
        F.cross_entropy(net(x[mine]), torch.arange(12)[mine] % 4).backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()["state"]
    found = [state[i][key] for i in state for key in sorted(state[i]) if key != "step"]
    return [_whole(p.detach()) for p in net.parameters()], list(map(_whole, found))


def _without_a_penalty(mesh: Any) -> dict[str, Any]:
    """The penalty of a rule that has none, after a call by layers."""
    masked = _by_layers(mesh, True, PARTS[:2], dwm.mask_model(_Net(), dwm.nn.TopK(density=0.5), seed=0))
    loss = masked(torch.ones(2, 16)).sum()
    penalty = masked.sparsity_penalty()
    (loss + penalty).backward()
    return {"no penalty": float(penalty)}


def _of_two(rank: int, group: Any, folder: str) -> dict[str, Any]:
    mesh = DeviceMesh.from_group(group, "cpu")
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found: dict[str, Any] = {
        "whole": _learned(_by_layers(mesh, whole=True, parts=()), mine),
        "by layers": _learned(_by_layers(mesh, whole=False), mine),
        "by layers in a whole": _learned(_by_layers(mesh, whole=True, parts=PARTS[:2]), mine),
        **_without_a_penalty(mesh),
        "compiled": Learning(mesh, compiled=True).run(0, 20).logits(),
        "MaskAdam": Learning(mesh).run(0, 10).save(folder, group).run(10, 20).logits(),
    }
    for name, ask in _refusals(mesh, _by_layers(mesh, whole=True, parts=()), folder).items():
        try:
            found[name] = repr(ask())
        except dwm.InputError as error:
            found[name] = str(error)
    return found


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    try:
        two = dist.new_group([0, 1])
        found = _of_two(rank, two, folder) if rank < 2 else {}
        dist.barrier()
        mesh = init_device_mesh("cpu", (3,))
        found["resumed"] = Learning(mesh).load(folder).run(10, 20).logits()
        found["own noise"] = Learning(mesh, noise="per-rank").run(0, 20).logits()
        found["frozen"] = {how: _tuned(how, mesh) for how in FROZEN}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as made:
        torch.multiprocessing.spawn(_rank, (made,), nprocs=3)
        yield Path(made)


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What the first two ranks found; the third had a part in `resumed` and `frozen`."""
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("how", ["whole", "by layers", "by layers in a whole"])
def test_a_sharded_model_learns_the_masks_of_one_process(ranks: list[dict[str, Any]], how: str) -> None:
    start = _logits(_masked().state_dict())
    alone, drawn = _train(_masked(), slice(None))
    expected = _logits(alone.state_dict())
    # The mean over ranks adds the rows in another order: each step's gradient, below 1, is off by ROWS roundings.
    torch.testing.assert_close(ranks[0][how]["logits"], expected, rtol=0, atol=STEPS * RATE * ROWS * 2**-23)
    assert (expected - start).abs().max() > 0.01
    for rank in ranks:
        assert torch.equal(rank[how]["drawn"], drawn)  # masks, bit for bit
        with torch.no_grad():
            torch.testing.assert_close(rank[how]["eval"], alone.eval()(torch.ones(1, 16)))


def _same(found: Tensor, expected: Tensor) -> None:
    """Rounding alone: sums in another order differ by 2^-24 of their terms, of which the smallest gradients here are
    2^-10, so by 2^-14 of themselves; Adam makes of it at most that share of a step of 0.05, and there are 20 steps."""
    torch.testing.assert_close(found, expected, rtol=0, atol=20 * 0.05 * 2.0**-14)


def test_mask_adam_steps_shards_and_its_distributed_checkpoint_goes_on_with_one_and_three(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    expected = Learning().run(0, 20).logits()
    assert (expected - Learning().logits()).abs().max() > 0.1
    assert (expected - Learning().load(str(folder), no_dist=True).logits()).abs().max() > 0.1
    for rank in ranks:
        _same(rank["MaskAdam"], expected)
        _same(rank["compiled"], expected)
        _same(rank["resumed"], expected)
        _same(rank["own noise"], Learning(mask_samples=3).run(0, 20).logits())
    _same(Learning().load(str(folder), no_dist=True).run(10, 20).logits(), expected)


@pytest.mark.parametrize("how", FROZEN)
def test_frozen_optimisers_step_shards_as_whole_tensors(ranks: list[dict[str, Any]], how: str) -> None:
    weights, state = _tuned(how)
    for found_weights, found_state in (rank["frozen"][how] for rank in ranks):
        for found, expected in zip([*found_weights, *found_state], [*weights, *state], strict=True):
            # As in `_same`: 2^-14 of three steps of 0.1.
            torch.testing.assert_close(found, expected, rtol=0, atol=3 * 0.1 * 2.0**-14)
        named = dict(zip(dict(_Net().named_parameters()), found_weights, strict=True))
        for name, keep in _keep().items():
            start = dict(_Net().named_parameters())[name]
            assert torch.equal(named[name][keep], start[keep])
            assert (named[name] != start)[~keep].float().mean() > 0.5


def test_a_rule_without_a_penalty_has_none_over_shards_too(ranks: list[dict[str, Any]]) -> None:
    assert [rank["no penalty"] for rank in ranks] == [0.0, 0.0]


def test_what_needs_whole_tensors_says_so_and_what_to_do(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for name, message in found.items():
            assert not isinstance(message, str) or name in message
    advice = {name: message.rpartition("; ")[2] for name, message in ranks[0].items() if isinstance(message, str)}
    assert "call fully_shard on masked layers, blocks or the masked model" in advice["a draw of masks needs whole"]
    assert "get_model_state_dict" in advice["merge needs whole"]


def test_logits_that_an_optimiser_does_not_have_are_noticed_at_the_next_call() -> None:
    masked = _masked()
    optimizer = MaskAdam(masked, lr=0.1)
    layer = masked.mask_layers()["first"]
    layer.mask_logits = nn.Parameter(layer.mask_logits.detach().clone())
    with pytest.raises(dwm.InputError, match="other tensors than when MaskAdam was made"):
        masked(torch.ones(1, 16))
    assert optimizer.state == {}
