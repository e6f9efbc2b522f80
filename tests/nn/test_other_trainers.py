"""What docs/layers.md says of trainers that know networks by their arguments' names, on a network of that style."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dwm_fast as dwm
from dwm_fast.errors import InputError


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Classifier(nn.Module):
    """Arguments by name, the loss in the output, a configuration and a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=2)
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.head((self.table(input_ids) * keep.unsqueeze(-1)).mean(1))
        return Output(logits, None if labels is None else F.cross_entropy(logits, labels))

    def generate(self, input_ids: Tensor) -> Tensor:
        return self(input_ids).logits.argmax(-1)


def _batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (6, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids > 10).long(), "labels": torch.arange(6) % 2}


def test_arguments_and_outputs_by_name_pass_through_and_the_masks_learn() -> None:
    net = Classifier()
    masked = dwm.mask_model(net, dwm.GumbelSigmoid(init=0.0), seed=0)
    before = [p.detach().clone() for p in masked.mask_parameters()]
    optimizer = dwm.optim.MaskAdam(masked, lr=0.1)
    output = masked(**_batch())
    assert isinstance(output, Output)
    assert output.loss is not None
    output.loss.backward()
    optimizer.step()
    assert not any(map(torch.equal, before, masked.mask_parameters()))


def test_a_masked_model_has_the_attributes_of_its_network_and_generates_what_a_merged_one_does() -> None:
    net, batch = Classifier(), _batch()
    masked: Any = dwm.mask_model(net, dwm.Threshold(), seed=0).eval()
    with torch.no_grad():
        masked.mask_layers()["head"].mask_logits[0] = -1.0
    assert masked.config is masked.model.config
    merged: Any = dwm.merge(masked)
    assert torch.equal(merged.generate(batch["input_ids"]), masked.generate(batch["input_ids"]))
    assert torch.equal(merged.generate(batch["input_ids"]), masked(batch["input_ids"]).logits.argmax(-1))


@dataclass
class Registered(Output):
    pass


torch.export.register_dataclass(Registered)


class Named(Classifier):
    def forward(self, input_ids: Any, **more: Any) -> Output:
        return Registered(super().forward(input_ids, **more).logits)


def _bank(net: nn.Module) -> dwm.MaskBank:
    bank = dwm.MaskBank(net.eval())
    for number, domain in enumerate(("a", "b")):
        bank.add(domain, {"head": torch.rand(2, 8, generator=torch.Generator().manual_seed(number)) < 0.5})
    return bank


def test_a_bank_takes_arguments_by_name_and_joins_outputs_by_name() -> None:
    bank, ids = _bank(Named()), _batch()["input_ids"]
    mixed = bank(input_ids=ids, domains=["a", "b", "b", "a", "b", "a"])
    for domain, rows in (("a", [0, 3, 5]), ("b", [1, 2, 4])):
        bank.activate(domain)
        assert torch.allclose(mixed.logits[rows], bank(input_ids=ids[rows]).logits, atol=1e-6)


def test_outputs_of_a_dataclass_that_nobody_registered_are_put_in_order_too() -> None:
    bank, ids = _bank(Classifier()), _batch()["input_ids"]
    mixed = bank(ids, domains=["a", "b", "b", "a", "b", "a"])
    bank.activate("b")
    assert torch.allclose(mixed.logits[[1, 2, 4]], bank(ids[[1, 2, 4]]).logits, atol=1e-6)


def test_samples_in_an_object_whose_parts_are_unknown_are_refused_not_mixed_up() -> None:
    class Closed(Classifier):
        def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
            return SimpleNamespace(logits=super().forward(input_ids).logits)

    bank, ids = _bank(Closed()), _batch()["input_ids"]
    with pytest.raises(InputError, match="gives a SimpleNamespace, an object whose tensors a mixed batch cannot put"):
        bank(ids, domains=["a", "b", "b", "a", "b", "a"])
    bank.activate("a")
    assert bank(ids).logits.shape == (6, 2)
    with pytest.raises(InputError, match="is given a SimpleNamespace"):
        _bank(Classifier())(ids, attention_mask=SimpleNamespace(mask=ids), domains=["a", "b", "b", "a", "b", "a"])
