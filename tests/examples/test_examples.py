"""Every example is under 50 lines, runs as it stands, and shows what its first line says."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """main() of an example, imported the way `python examples/NAME.py` finds its neighbours."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: importlib.import_module(name).main()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_fewer_than_50_lines_and_a_test_below(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 50
    if path.stem == "fggm":  # a method and no program: its test types the commands that run it
        assert "fggm.py" in (ROOT / "tests/pacs/test_own_method.py").read_text(encoding="utf-8")
    else:
        assert f'run("{path.stem}")' in Path(__file__).read_text(encoding="utf-8")


# Accuracies below come from 4,096 samples (500 for the bank): the standard error is at most 0.008 (0.023).


def test_learn_a_mask_drops_most_weights_and_keeps_the_accuracy(run):
    before, after, kept = run("learn_a_mask")
    assert 0.1 < kept < 0.5
    assert before > 0.8
    assert after > before - 0.04


def test_tune_without_forgetting_leaves_the_first_domain_as_it_was_under_its_own_bits(run):
    sketch, shared, own = run("tune_without_forgetting")
    assert sketch > 0.8
    assert own > 0.8 > shared


def test_serve_a_bank_is_good_on_every_domain_of_a_mixed_batch(run):
    assert min(run("serve_a_bank")) > 0.75  # a random network guesses 0.25


def test_mask_a_transformer_learns_and_stores_a_bit_per_masked_weight(run):
    losses, weights, nbytes = run("mask_a_transformer")
    assert losses[-1] < losses[0] / 2
    assert nbytes < weights / 8 + 16 * 1024  # bits, head and a header under 16 KiB


def test_data_parallel_learns_a_mask_in_one_process_too(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert 0.02 < run("data_parallel") < 0.5
    assert (tmp_path / "masked.safetensors").is_file()


def test_fggm_has_at_most_40_lines():
    assert len((EXAMPLES / "fggm.py").read_text(encoding="utf-8").splitlines()) <= 40


def test_own_method_keeps_the_fraction_that_it_was_asked_for(run):
    assert run("own_method") == pytest.approx(0.3, abs=0.001)
