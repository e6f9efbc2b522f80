"""Domains with classes of their own: every method of a sequence learns them, and so does a pair."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from dwm_fast.methods import sequential_methods
from dwm_fast.pacs.data import DomainSet, PacsData, fingerprint, validation_part
from dwm_fast.pacs.sequence import SequenceStudy

from .sequence_for_tests import BASE
from .study_for_tests import tiny, tiny_data

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


def test_every_method_of_a_sequence_learns_domains_with_classes_of_their_own(tmp_path: Path) -> None:
    names = tuple(sequential_methods())
    config = dataclasses.replace(BASE, sequence=tuple(SPLITS), methods=names).with_task_epochs(1)
    study = SequenceStudy(config, tmp_path, split_data())
    results = study.run()
    assert set(results["methods"]) == set(names)
    for method in names:
        learner = study.lab.learner(method, len(SPLITS) - 1, 0)
        widths = [learner.network(name)(torch.zeros(1, 3, 16, 16)).shape[1] for name in SPLITS]
        assert widths == [len(labels) for labels in SPLITS.values()], method
