"""Networks of torchvision, timm and transformers, each through all that the library does with a mask."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import dwm_fast as dwm
from dwm_fast.errors import InputError

from .networks import CASES, made, scores

PAGE = Path(__file__).parents[2] / "docs/models.md"


def _close(a: Any, b: Any) -> None:
    """Equal but for the order of sums: at most 1,000 terms of fp32 each, through 60 layers."""
    scale = float(scores(b).abs().max())
    torch.testing.assert_close(scores(a), scores(b), rtol=0, atol=1000 * 2.0**-24 * scale)


@pytest.mark.parametrize("name", CASES)
def test_mask_step_keep_merge_pack_bank_and_mixed_batch(name: str) -> None:
    network, args, kwargs = made(name)
    case = CASES[name]
    kind = dwm.GumbelSigmoid(init=0.5, spread=1.0)
    if case.options:
        with pytest.raises(InputError, match="tied='share'"):
            dwm.mask_model(network, kind, seed=0)
    masked = dwm.mask_model(network, kind, seed=0, **case.options).train()
    optimizer = dwm.optim.MaskAdam(masked, lr=0.3)
    before = [p.detach().clone() for p in masked.mask_parameters()]
    (scores(masked(*args, **kwargs)).square().mean() + masked.sparsity_penalty()).backward()
    optimizer.step()
    assert not any(map(torch.equal, before, masked.mask_parameters()))
    masked.eval()
    with torch.no_grad():
        expected = masked(*args, **kwargs)
        plain = scores(network(*args, **kwargs))
        assert (scores(expected) - plain).abs().max() > 0.05 * plain.abs().max()
        merged = dwm.merge(masked)
        assert [type(module) for module in merged.modules()] == [type(module) for module in network.modules()]
        assert list(merged.state_dict()) == list(network.state_dict())
        _close(merged(*args, **kwargs), expected)
        for parameter, mask in zip(masked.mask_parameters(), masked.keep_masks().values(), strict=True):
            assert torch.equal(mask, parameter >= 0)
        _close(dwm.pack(masked)(*args, **kwargs), expected)
        mixed = _in_a_bank(network, masked, args, kwargs, case.samples_mix)
    line = f"| {name} | {masked.coverage().share:.1%} | {'shared' if case.options else ''} | {mixed} |"
    assert line in PAGE.read_text(encoding="utf-8")


def _in_a_bank(network: nn.Module, masked: Any, args: Any, kwargs: Any, samples_mix: bool) -> str:
    """How a mixed batch runs: by layer, domain by domain, or refused."""
    other = copy.deepcopy(masked)
    for parameter in other.mask_parameters():
        parameter.neg_()
    bank = dwm.MaskBank(network)
    expected = []
    for domain, model in (("a", masked), ("b", other)):
        bank.add(domain, model)
        bank.activate(domain)
        expected.append(scores(model(*args, **kwargs)))
        _close(bank(*args, **kwargs), expected[-1])
    if samples_mix:
        with pytest.raises(InputError, match="depends on the other samples"):
            bank(*args, domains=["b", "a"], **kwargs)
        return "refused"
    both = scores(bank(*args, domains=["b", "a"], **kwargs))
    _close(both, torch.stack([expected[1][0], expected[0][1]]))
    return "by layer" if bank.serve(["a", "b"]).layerwise else "domain by domain"


def test_the_page_has_no_other_lines_than_those_of_the_networks() -> None:
    rows = [line.split(" | ")[0] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert rows == ["| network", *(f"| {name}" for name in CASES)]


def test_a_masked_llama_goes_out_as_a_mask_and_as_a_plain_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    network, _, inputs = made("LlamaForCausalLM")
    network.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    masked: Any = dwm.mask_model(base, dwm.GumbelSigmoid(init=0.5, spread=1.0), seed=0).eval()
    dwm.MaskAdapter.from_masked(masked, base, "law").save_pretrained(tmp_path / "mask")
    adapter = dwm.MaskAdapter.from_pretrained(tmp_path / "mask")
    assert adapter.base_model_name_or_path == str(tmp_path / "base")
    adapter.apply(network).save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is transformers.LlamaForCausalLM
    bank = dwm.MaskBank.from_pretrained(tmp_path / "mask", base)
    bank.activate("law")
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, masked(**inputs).logits)
    written = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (plain, masked, bank)]
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])
