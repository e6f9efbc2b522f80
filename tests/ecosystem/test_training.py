"""The blocks of docs/training.md: each stack trains a masked model as typed, and the masks learn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import dwm_fast as dwm

PAGE = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```py\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, intermediate_size=32))


@pytest.mark.filterwarnings("ignore")  # of the trainers, about workers and devices
@pytest.mark.parametrize("stack", BLOCKS)
def test_a_stack_trains_the_masks_and_nothing_else(stack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = torch.randint(3, 60, (16, 5), generator=torch.Generator().manual_seed(1))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    samples = torch.utils.data.TensorDataset(x, torch.arange(8) % 3)
    given: dict[str, Any] = {
        "dwm": dwm,
        "F": F,
        "transformers": transformers,
        "accelerate": accelerate,
        "lightning": lightning,
        "network": network,
        "bert": bert,
        "loader": torch.utils.data.DataLoader(samples, batch_size=4),
        "sentences": [{"input_ids": row, "labels": i % 2} for i, row in enumerate(tokens)],
    }
    exec(compile(BLOCKS[stack], f"docs/training.md, {stack}", "exec"), given)
    masked = given["masked"]
    start = dwm.GumbelSigmoid().init
    assert all((logits.detach() != start).any() for logits in masked.mask_parameters())
    plain = (bert if stack.startswith("transformers") else network)().state_dict()
    trained = dwm.merge(masked.eval()).state_dict()
    assert all(torch.equal(trained[key], value) for key, value in plain.items() if key.endswith("bias"))
    assert masked.rng_state.tolist()[1] == 2  # two calls drew masks


def test_every_stack_of_the_page_has_a_block() -> None:
    assert list(BLOCKS) == ["Plain PyTorch", "transformers.Trainer", "Accelerate", "Lightning"]
