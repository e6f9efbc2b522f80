"""FSDP2 (fully_shard) over masked models, whole and by layers: it trains as one process would.

Two gloo processes on the CPU, started once for all tests of this file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import dwm_fast as dwm
from dwm_fast.optim import FrozenAdamW, MaskAdam

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


def _masked() -> dwm.MaskedModel:
    return dwm.mask_model(_Net(), dwm.GumbelSigmoid(init=0.0), seed=0)


PARTS = ("first", "middle", "last")


def _by_layers(mesh: Any, whole: bool, parts: tuple[str, ...] = PARTS) -> dwm.MaskedModel:
    """Each part sharded by itself; `whole`: what is left of the model too, with its shards gathered by the root."""
    masked = _masked()
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

    def frozen() -> object:
        return FrozenAdamW(fully_shard(_Net(), mesh=mesh).parameters())

    return {
        "a draw of masks needs whole": a_mask_alone,
        "the penalty of a layer that was sharded by itself": the_penalty_alone,
        "other tensors than when MaskAdam was made": made_before,
        "FrozenAdamW needs whole": frozen,
        "MaskAdam needs whole": lambda: MaskAdam(masked),
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


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        found: dict[str, Any] = {
            "whole": _learned(_by_layers(mesh, whole=True, parts=()), mine),
            "by layers": _learned(_by_layers(mesh, whole=False), mine),
            "by layers in a whole": _learned(_by_layers(mesh, whole=True, parts=PARTS[:2]), mine),
        }
        for name, ask in _refusals(mesh, _by_layers(mesh, whole=True, parts=()), folder).items():
            try:
                found[name] = repr(ask())
            except dwm.InputError as error:
                found[name] = str(error)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder,), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]


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


def test_what_needs_whole_tensors_says_so_and_what_to_do(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for name, message in found.items():
            assert not isinstance(message, str) or name in message
    advice = {name: message.rpartition("; ")[2] for name, message in ranks[0].items() if isinstance(message, str)}
    assert "call fully_shard on masked layers, blocks or the masked model" in advice["a draw of masks needs whole"]
    assert "get_model_state_dict" in advice["merge needs whole"]
    assert "torch.optim.Adam(masked.mask_parameters())" in advice["MaskAdam needs whole"]


def test_logits_that_an_optimiser_does_not_have_are_noticed_at_the_next_call() -> None:
    masked = _masked()
    optimizer = MaskAdam(masked, lr=0.1)
    layer = masked.mask_layers()["first"]
    layer.mask_logits = nn.Parameter(layer.mask_logits.detach().clone())
    with pytest.raises(dwm.InputError, match="other tensors than when MaskAdam was made"):
        masked(torch.ones(1, 16))
    assert optimizer.state == {}
