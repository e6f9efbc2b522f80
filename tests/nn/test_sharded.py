"""FSDP2 (fully_shard) over masked models: whole, it trains as one process would; all else is one clear error.

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

import dwm_fast as dwm
from dwm_fast.optim import FrozenAdamW, MaskAdam

STEPS, ROWS = 3, 8


def _plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def _masked() -> dwm.MaskedModel:
    return dwm.mask_model(_plain(), dwm.GumbelSigmoid(init=0.0), seed=0)


def _train(masked: nn.Module, logits: list[nn.Parameter], rows: slice) -> None:
    x, y = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1))[rows], torch.arange(ROWS)[rows] % 4
    optimizer = torch.optim.SGD(logits, lr=1.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (F.cross_entropy(masked(x), y) + masked.sparsity_penalty()).backward()  # type: ignore[operator]
        optimizer.step()


def _logits(state: dict[str, Any]) -> Tensor:
    return torch.cat([value.flatten() for name, value in state.items() if name.endswith("mask_logits")])


def _refusals(mesh: Any, masked: dwm.MaskedModel, folder: str) -> dict[str, Callable[[], object]]:
    """What is asked for by name; each has to be an InputError on every rank."""

    def per_layer() -> object:
        own = _masked()
        for layer in own.mask_layers().values():
            fully_shard(layer, mesh=mesh)
        fully_shard(own, mesh=mesh)
        return own(torch.ones(1, 16))

    def made_before() -> object:
        own = _masked()
        MaskAdam(own)
        fully_shard(own, mesh=mesh)
        return own(torch.ones(1, 16))

    def frozen() -> object:
        return FrozenAdamW(fully_shard(_plain(), mesh=mesh).parameters())

    return {
        "a draw of masks": per_layer,
        "other tensors than when MaskAdam was made": made_before,
        "FrozenAdamW needs whole": frozen,
        "MaskAdam needs whole": lambda: MaskAdam(masked),
        "keep_masks needs whole": masked.fraction_kept,
        "sparsity_penalty needs whole": masked.sparsity_penalty,
        "save_masked needs whole": lambda: dwm.save_masked(masked, f"{folder}/x.safetensors"),
        "merge needs whole": lambda: dwm.merge(masked),
        "pack needs whole": lambda: dwm.pack(masked),
        "mask_model needs whole": lambda: dwm.mask_model(fully_shard(_plain(), mesh=mesh), dwm.Threshold()),
    }


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        masked = _masked()
        fully_shard(masked, mesh=mesh)
        half = ROWS // 2
        _train(masked, list(masked.mask_parameters()), slice(rank * half, rank * half + half))
        state = get_model_state_dict(masked, options=StateDictOptions(full_state_dict=True))
        found = {"logits": _logits(state) if rank == 0 else None}
        for name, ask in _refusals(mesh, masked, folder).items():
            try:
                found[name] = repr(ask())
            except dwm.InputError as error:
                found[name] = str(error)
        with torch.no_grad():
            found["eval"] = masked.eval()(torch.ones(1, 16))
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder,), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]


def test_a_model_sharded_whole_learns_the_masks_of_one_process(ranks: list[dict[str, Any]]) -> None:
    alone = _masked()
    start = _logits(alone.state_dict())
    _train(alone, list(alone.mask_parameters()), slice(None))
    expected = _logits(alone.state_dict())
    # The mean over ranks adds the rows in another order: each step's gradient, below 1, is off by ROWS roundings.
    torch.testing.assert_close(ranks[0]["logits"], expected, rtol=0, atol=STEPS * ROWS * 2**-23)
    assert (expected - start).abs().max() > 0.01
    assert torch.equal(ranks[0]["eval"], ranks[1]["eval"])
    with torch.no_grad():
        torch.testing.assert_close(ranks[0]["eval"], alone.eval()(torch.ones(1, 16)))


def test_what_needs_whole_tensors_says_so_and_what_to_do(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for name, message in found.items():
            if isinstance(message, str):
                assert name in message
    advice = {name: message.rpartition("; ")[2] for name, message in ranks[0].items() if isinstance(message, str)}
    assert "call fully_shard on the masked model" in advice["a draw of masks"]
    assert "get_model_state_dict" in advice["merge needs whole"]
    assert "torch.optim.Adam(masked.mask_parameters())" in advice["MaskAdam needs whole"]


def test_logits_that_an_optimiser_does_not_have_are_noticed_at_the_next_call() -> None:
    masked = _masked()
    optimizer = MaskAdam(masked, lr=0.1)
    layer = masked.mask_layers()["0"]
    layer.mask_logits = nn.Parameter(layer.mask_logits.detach().clone())
    with pytest.raises(dwm.InputError, match="other tensors than when MaskAdam was made"):
        masked(torch.ones(1, 16))
    assert optimizer.state == {}
