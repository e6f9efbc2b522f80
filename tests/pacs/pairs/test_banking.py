"""A study's masks in a bank compute what the study's view `masked` does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dwm_fast import MaskBank
from dwm_fast.errors import InputError
from dwm_fast.methods import masked_view
from dwm_fast.pacs.pairs.banking import bank_of, save_bank
from dwm_fast.pacs.study import Study

from ..study_for_tests import config, tiny


@pytest.mark.parametrize("biases", [False, True])
def test_a_bank_of_a_study_is_its_sources_under_their_own_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, biases: bool
) -> None:
    tiny(monkeypatch)
    monkeypatch.setattr("dwm_fast.pacs.pairs.figures.draw_all", lambda results: {})
    run, out = tmp_path / "run", tmp_path / "domains"
    study = Study(config(methods=["none", "binary"], binary={"biases": biases}), run)
    with pytest.raises(InputError, match=r"no config\.json; expected the run folder of a finished study"):
        bank_of(run, "binary", 0)
    results = study.run()
    assert save_bank(run, out, "binary", 0).startswith(f"2 domains in {out}: photo, sketch; their network in")
    network = study.lab.network(load_file(out / "backbone.safetensors"))
    bank = MaskBank.load(out, network)
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    for mask in results["masks"]:
        trained = study.lab.network(study.lab.source(mask["source"], 0).end)
        keep = study.lab.mask(mask["source"], "binary", 0).found.keep  # type: ignore[attr-defined]
        assert any(name.endswith(".bias") for name in keep) is biases
        bank.activate(mask["source"])
        with torch.no_grad():
            assert torch.equal(bank(x), masked_view(trained, trained, keep)(x))
        bank.activate(mask["source"])
        assert study.lab.evaluate(bank, mask["source"])[0] == mask["masked_accuracy"]
    for method, seed, says in (
        ("naive", 0, "'naive' has no mask"),
        ("none", 0, "expected one of binary"),
        ("binary", 3, "seed 3"),
    ):
        with pytest.raises(InputError, match=says):
            bank_of(run, method, seed)
    next((run / "stages").glob("mask-binary-photo*")).unlink()
    with pytest.raises(InputError, match="stage mask-binary-photo-seed0 is not done"):
        bank_of(run, "binary", 0)
