"""The study of language models on a tiny network: its text, its rows, its files, and the same numbers again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.language.network import SmallLlama
from dwm_fast.language.study import LanguageStudy, cross_entropy, run, table
from dwm_fast.language.text import Text

DOCS = Path(__file__).parents[2] / "docs"
TINY = LanguageStudy(width=16, layers=1, heads=2, hidden=16, length=24, rows=4, steps=30, mask_steps=6, pieces=4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    said = []
    return folder, run(TINY, folder, said.append), said


def test_held_out_topics_are_no_part_of_the_training_text():
    text = Text()
    assert len(text.train) > 8 * len(text.test) > 0
    train, test = ("".join(text.letters[i] for i in part.tolist()) for part in (text.train, text.test))
    assert test[5000:5200] not in train


def test_batches_are_neighbours_and_the_same_for_an_epoch():
    text = Text()
    (x, y), (again, _) = (next(text.batches(3, 1, 4, 10)) for _ in range(2))
    assert x.shape == y.shape == (4, 10)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, again)
    assert not torch.equal(x, next(text.batches(4, 1, 4, 10))[0])


def test_the_network_sees_no_later_letter():
    torch.manual_seed(0)
    network = SmallLlama(11, 16, 2, 2, 16).eval()
    x = torch.randint(11, (2, 12))
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    torch.testing.assert_close(network(x)[:, :7], network(changed)[:, :7])
    assert not torch.equal(network(x)[:, 7:], network(changed)[:, 7:])


def test_cross_entropy_of_even_guesses_is_the_logarithm_of_the_vocabulary():
    class Even(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape, 50)

    tokens = torch.randint(50, (70, 9))
    assert cross_entropy(Even(), tokens, tokens) == pytest.approx(math.log(50), rel=1e-12)


def test_every_method_keeps_the_density_that_was_asked_for(results):
    _, found, _ = results
    rows = found["rows"]
    assert [(row["sparsity"], row["method"]) for row in rows] == list(TINY.methods())
    assert all(abs(row["density"] - 0.5) <= 0.005 for row in rows)
    assert all(row["density"] == 0.5 for row in rows if row["sparsity"] == "2:4")


def test_the_folder_holds_results_table_and_figure(results):
    folder, found, said = results
    assert json.loads((folder / "results.json").read_text()) == found
    table = (folder / "table.md").read_text()
    assert table.count("\n") == 3 + len(found["rows"])
    assert f"| 2:4 | maskllm | 0.5000 | {found['rows'][-1]['perplexity']:.3f} |" in table
    assert "<svg" in (folder / "perplexity.svg").read_text()
    assert len(said) == 2 + len(found["rows"])


def test_the_same_seed_gives_the_same_numbers(results, tmp_path):
    _, found, _ = results
    again = run(TINY, tmp_path, lambda _: None)
    assert again["dense"] == found["dense"]
    assert [row["perplexity"] for row in again["rows"]] == [row["perplexity"] for row in found["rows"]]


def test_options_out_of_range_are_named():
    with pytest.raises(InputError, match="steps is 0"):
        LanguageStudy(steps=0)


def test_the_pages_say_what_was_recorded():
    recorded = json.loads((DOCS / "results/language.json").read_text(encoding="utf-8"))
    assert table(recorded) in (DOCS / "language.md").read_text(encoding="utf-8")
    for sparsity, name in (("50 %", "leap"), ("2:4", "maskllm")):
        page = (DOCS / f"methods/{name}.md").read_text(encoding="utf-8")
        rows = [row for row in recorded["rows"] if row["sparsity"] == sparsity]
        assert all(f"{number:.3f}" in page for number in (recorded["dense"], *(row["perplexity"] for row in rows)))
