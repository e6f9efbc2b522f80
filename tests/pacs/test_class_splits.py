"""Domains with classes of their own: every method of a sequence learns them, and so does a pair."""

from __future__ import annotations

import dataclasses
import functools
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from dwm_fast.cli import app
from dwm_fast.errors import DataError, InputError
from dwm_fast.methods import masked_view, sequential_methods
from dwm_fast.pacs.config import StudyConfig, builtin_defaults, from_dict, load_config
from dwm_fast.pacs.data import DomainSet, PacsData, fingerprint, validation_part
from dwm_fast.pacs.pairs.banking import bank_of
from dwm_fast.pacs.pairs.study import PairStudy
from dwm_fast.pacs.sequence import SequenceStudy
from dwm_fast.pacs.sequence.lab import SequenceLab
from dwm_fast.pacs.sequence.table import SequenceRow, to_rich
from dwm_fast.pacs.study import Study
from dwm_fast.pacs.tables import Stat

from .data.test_any import write_rows
from .sequence_for_tests import BASE
from .study_for_tests import CONFIG, tiny, tiny_data

SPLITS = {"lit": (0, 1), "round": (2, 3, 4), "others": (5, 6)}
"""Domain -> its classes by their numbers in the built-in images."""


@functools.cache
def split_data() -> PacsData:
    """The domain photo of the tiny images, cut by class into three domains."""
    data = tiny_data()
    photo = data.domains["photo"]
    sets = {}
    for name, labels in SPLITS.items():
        mine = torch.isin(photo.labels, torch.tensor(labels)).nonzero()[:, 0]
        parts = [torch.isin(mine, part).nonzero()[:, 0] for part in (photo.train, photo.test)]
        sets[name] = DomainSet(
            photo.images[mine],
            photo.labels[mine] - labels[0],
            *parts,
            [photo.names[i] for i in mine],
            tuple(data.classes[k] for k in labels),
        )
    return dataclasses.replace(data, domains=sets, fingerprint=fingerprint(sets))


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    for wing in ("pairs", "sequence"):
        monkeypatch.setattr(f"dwm_fast.pacs.{wing}.figures.draw_all", lambda results: {})


def test_classes_are_part_of_a_domains_fingerprint_where_they_are_its_own() -> None:
    domain = split_data().domains["lit"]
    plain = dataclasses.replace(domain, classes=())
    renamed = dataclasses.replace(domain, classes=("a", "b"))
    assert len({fingerprint({"lit": one}) for one in (domain, plain, renamed)}) == 3


def test_a_validation_part_keeps_the_classes_of_its_domains() -> None:
    part = validation_part(split_data(), 0.3)
    assert part.classes_of("round") == ("triangle", "square", "star")
    assert part.domains["round"].labels.unique().tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def cifar_shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes of 32 x 32 pixels as the hub has CIFAR-100: parquet files, columns img and fine_label."""
    folder = tmp_path_factory.mktemp("shaped")
    names = {"fine_label": [f"kind{k}" for k in range(7)]}
    for part, each in (("train", 4), ("test", 2)):
        write_rows(folder / f"{part}-00000-of-00001.parquet", noise_rows(7, each), names, pq.write_table)
    return folder


def noise_rows(classes: int, each: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(classes * each)
    rows = []
    for label in range(classes):
        for _ in range(each):
            out = io.BytesIO()
            Image.fromarray(generator.integers(0, 246 * label // classes + 9, (32, 32, 3), dtype=np.uint8)).save(
                out, "png"
            )
            rows.append({"img": {"bytes": out.getvalue(), "path": None}, "fine_label": label})
    return rows


def typed(*words: str, data: Path, out: Path) -> dict[str, Any]:
    """The results of a command on the CIFAR-shaped images, split into three domains."""
    tiny_flags = "--backbone small --image-size 16 --train-size 16 --batch-size 4 --source-epochs 1 --device cpu"
    images = ["--data", str(data), "--columns", "label=fine_label", "--split-classes", "3", "--out", str(out)]
    answer = CliRunner().invoke(app, ["pacs", *words, *images, *tiny_flags.split()], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    results = json.loads((out / "results.json").read_text())
    count, classes = results["data"]["images"], len(results["data"]["classes"])
    about = (
        f"{count} images, {classes} classes, {len(results['data']['domains'])} domains; test images: the data set's own"
    )
    for text in (answer.output, *((out / file).read_text() for file in ("table.md", "report.html"))):
        assert about in html.unescape(" ".join(text.split()))
    return results  # type: ignore[no-any-return]


def test_every_method_of_a_sequence_learns_split_cifar_shaped_images(cifar_shaped: Path, tmp_path: Path) -> None:
    names = ",".join(sequential_methods())
    results = typed("sequence", "all", "--methods", names, "--task-epochs", "1", data=cifar_shaped, out=tmp_path)
    domains = ["classes-0-2", "classes-3-4", "classes-5-6"]
    assert (results["sequence"], results["config"]["sequence"]) == (domains, domains)
    assert set(results["methods"]) == set(sequential_methods())
    assert (results["data"]["images"], len(results["data"]["classes"])) == (42, 7)
    study = Study(load_config(tmp_path / "config.json", builtin_defaults()), tmp_path)
    assert isinstance(study, SequenceStudy)
    for method in results["methods"]:
        learner = study.lab.learner(method, 2, 0)
        widths = [learner.network(name)(torch.zeros(1, 3, 16, 16)).shape[1] for name in domains]
        assert widths == [3, 2, 2], method
    name = f"{cifar_shaped.name}, classes split into 3 domains"
    assert results["data"]["name"] == name
    assert results["data"]["classes_of"]["classes-3-4"] == ["kind3", "kind4"]
    assert all(name in (tmp_path / file).read_text() for file in ("table.md", "table.csv", "report.html"))


def test_pairs_of_split_cifar_shaped_images_run_and_become_a_bank(cifar_shaped: Path, tmp_path: Path) -> None:
    pair = "--sources classes-0-2,classes-3-4 --targets classes-3-4,classes-0-2 --methods none,naive --inits S_end"
    results = typed(*pair.split(), "--tune-epochs", "1", data=cifar_shaped, out=tmp_path)
    assert {(r["source"], r["target"]) for r in results["rows"]} == {
        ("classes-0-2", "classes-3-4"),
        ("classes-3-4", "classes-0-2"),
    }
    assert "published" not in (tmp_path / "report.html").read_text().lower()
    bank = bank_of(tmp_path, "naive", 0)
    study = Study(load_config(tmp_path / "config.json", builtin_defaults()), tmp_path)
    assert isinstance(study, PairStudy)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for source in ("classes-0-2", "classes-3-4"):
        trained = study.lab.network(study.lab.source(source, 0).end, study.lab.classes(source))
        bank.activate(source)
        with torch.no_grad():
            wanted = masked_view(trained, trained, study.lab.mask(source, "naive", 0).found.keep or {})(images)
            assert torch.equal(bank(images), wanted)
    assert [bank(torch.zeros(1, 3, 16, 16), domains=[name]).shape[1] for name in bank.domains] == [3, 2]


def test_a_long_sequence_has_names_that_files_can_have_and_a_table_that_screens_can_show(tmp_path: Path) -> None:
    many = tuple(f"classes-{5 * k}-{5 * k + 4}" for k in range(20))
    data = dataclasses.replace(split_data(), domains=dict.fromkeys(many, split_data().domains["lit"]))
    lab = SequenceLab(dataclasses.replace(BASE, sequence=many, methods=("none",)), data, tmp_path, torch.device("cpu"))
    names = [lab.task_stage("none", position, 0)[0] for position in range(20)]
    assert len(set(names)) == 20
    assert max(map(len, names)) < 200
    assert names[1] == "sequence-none-classes-0-4-classes-5-9-seed0"
    one = Stat(0.5)
    row = SequenceRow("x", "none", "shared", dict.fromkeys(many, one), *[one] * 8, seeds=1)
    out = io.StringIO()
    Console(width=80, file=out).print(to_rich([row]))
    assert "…" not in out.getvalue()
    assert "each of the 20 domains" in " ".join(out.getvalue().split())


def test_a_wrong_path_is_told_before_wrong_domains_and_options(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nowhere: no such file or folder \(asked for domain 'clipart'"):
        from_dict({"data": nowhere, "sources": "photo,clipart"}, builtin_defaults())
    config = from_dict({"data": nowhere, "images": {"split_classes": 3}}, builtin_defaults())
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        Study(config, tmp_path / "run")
    config = from_dict({"images": {"split_classes": 3}}, builtin_defaults())
    with pytest.raises(InputError, match=r"images\.split_classes does not go with the built-in images"):
        Study(config, tmp_path / "run")


def pair_config(**changes: Any) -> StudyConfig:
    """lit -> round and round -> lit, of two and three classes, fine-tuned for no epoch."""
    ways = {method: (dataclasses.replace(CONFIG.tune[method][0], epochs=0),) for method in ("none", "binary", "naive")}
    own = {"sources": ("lit", "round"), "targets": ("lit", "round"), "methods": ("none", "binary", "naive")}
    return dataclasses.replace(CONFIG, **{**own, "inits": ("S_end",), "tune": ways, **changes})


def test_in_a_pair_the_source_is_judged_with_its_own_head(tmp_path: Path) -> None:
    """After no epoch of fine-tuning from S_end the network is the source's but for the head."""
    study = PairStudy(pair_config(), tmp_path, split_data())
    results = study.run()
    masked = {(m["source"], m["method"]): m["masked_accuracy"] for m in results["masks"]}
    assert {(r["source"], r["target"]) for r in results["rows"]} == {("lit", "round"), ("round", "lit")}
    for row in results["rows"]:
        wanted = row["source_before"] if row["view"] == "shared" else masked[row["source"], row["method"]]
        assert row["source_after"] == wanted, row
    assert results["data"]["classes_of"]["round"] == ["triangle", "square", "star"]
    assert "different classes" in (tmp_path / "report.html").read_text()


def test_in_a_pair_the_target_has_a_head_of_its_own_that_no_mask_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(model: Any, *_: Any, keep: Any = None, **__: Any) -> None:
        if keep is not None:
            seen.append((keep, model.fc.weight.detach().clone()))
        model.eval()

    monkeypatch.setattr("dwm_fast.pacs.pairs.lab.train", spy)
    biases = dataclasses.replace(CONFIG.binary, biases=True)
    study = PairStudy(pair_config(targets=("round",), sources=("lit",), binary=biases), tmp_path, split_data())
    study.run()
    assert len(seen) == 2  # binary and naive
    found = [set(study.lab.mask("lit", method, 0).found.keep or ()) for method in ("binary", "naive")]
    assert [sorted(name for name in keep if name.startswith("fc")) for keep in found] == [["fc", "fc.bias"], ["fc"]]
    assert [set(keep) for keep, _ in seen] == [keep - {"fc", "fc.bias"} for keep in found]
    assert all(head.shape == (3, 64) for _, head in seen)
    assert torch.equal(seen[0][1], seen[1][1])  # one for all methods


def test_in_a_pair_the_source_is_judged_on_the_tuned_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []

    def spy(model: Any, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(len(name))

    def view(tuned: Any, source: Any, policy: str) -> Any:
        judged.append({name: value.clone() for name, value in tuned.named_parameters()})
        return tuned

    monkeypatch.setattr("dwm_fast.pacs.pairs.lab.source_view", view)
    monkeypatch.setattr("dwm_fast.pacs.pairs.lab.train", spy)
    study = PairStudy(pair_config(targets=("round",), sources=("lit",), methods=("none",)), tmp_path, split_data())
    study.run()
    trained = study.lab.source("lit", 0).end
    for name, value in judged[0].items():
        assert torch.equal(value, trained[name] if name.startswith("fc.") else torch.full_like(value, len(name))), name


def test_a_method_that_sees_the_target_is_refused_where_classes_differ(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'fggm' looks at the target.*lit and round have different classes"):
        PairStudy(pair_config(methods=("none", "fggm")), tmp_path, split_data())
