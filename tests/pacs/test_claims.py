"""Who is at work in a run folder: a stage is done once, configurations do not mix, results are not lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.pacs.claims import Claims
from dwm_fast.pacs.config import StudyConfig
from dwm_fast.pacs.pairs.study import PairStudy
from dwm_fast.pacs.stages import StageFolder
from dwm_fast.pacs.study import Study

from .sequence_for_tests import offer_toys, sequence_config
from .study_for_tests import config, stages, tiny, tiny_data, without_seconds

ONE = {"sources": ["photo"], "targets": ["sketch"], "methods": ["none", "naive"]}
SOURCE, MASK = "source-photo-seed0", "mask-naive-photo-seed0"
PLAIN, TUNE = "tune-photo-sketch-none---seed0", "tune-photo-sketch-naive-S_start-seed0"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    for kind in ("pairs", "sequence"):
        monkeypatch.setattr(f"dwm_fast.pacs.{kind}.figures.draw_all", lambda results: {})


def one(folder: Path, **changes: Any) -> Study:
    return Study(config(**{**ONE, **changes}), folder, tiny_data())


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_stage_that_many_want_at_once_is_done_by_one_and_read_by_the_others(tmp_path: Path) -> None:
    done, waited, found = [], [], []

    def work() -> None:
        stages = StageFolder(tmp_path / "stages")
        stages.waits = waited.append

        def make() -> Any:
            done.append(1)
            time.sleep(0.2)
            return stages.write("a", {"x": torch.ones(1)}, {"accuracy": len(done)}, {}, time.perf_counter())

        found.append(stages.once("a", {}, make)[1]["accuracy"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (done, found) == ([1], [1] * 4)
    assert waited == ["a"] * 3


def test_a_stage_is_free_at_once_when_the_process_that_held_it_is_killed(tmp_path: Path) -> None:
    claims, (read, write) = Claims(tmp_path), os.pipe()
    pid = os.fork()
    if pid == 0:
        with claims.stage("a"):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    assert os.read(read, 1) == b"x"
    assert claims.taken("a")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not claims.taken("a")
    waited: list[str] = []
    with claims.stage("a", waited.append):
        assert not waited


def test_where_a_file_system_has_no_locks_a_study_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert len(one(tmp_path).run()["rows"]) == 3


def test_another_configuration_is_refused_while_one_is_at_work_and_nothing_is_written(tmp_path: Path) -> None:
    photo, art = one(tmp_path), one(tmp_path, sources=["art"])
    with photo.lab.stages.claims.study(photo.config):
        before = files(tmp_path)
        with pytest.raises(InputError, match=r"another study is at work.*sources: \['photo'\] there, \['art'\] now"):
            art.run()
        assert files(tmp_path) == before
        one(tmp_path).run_stage(SOURCE)  # of the same configuration
    assert art.run()["config"]["sources"] == ["art"]


def test_results_that_a_study_would_leave_out_are_kept_and_it_is_refused(tmp_path: Path) -> None:
    one(tmp_path).run()
    before = files(tmp_path)
    lost: list[tuple[dict[str, Any], str]] = [
        ({"sources": ["art"]}, "sources photo"),
        ({"targets": ["art"]}, "targets sketch"),
        ({"seeds": [1]}, "seeds 0"),
        ({"inits": ["random"]}, "inits S_start"),
        ({"methods": ["none"]}, "methods naive"),
        ({"tune": {"none": {"lr": 0.5}}}, "tune.none per-domain at lr 0.01"),
    ]
    for changes, named in lost:
        with pytest.raises(InputError, match=f"holds results that this study would leave out .{named}.*--out"):
            one(tmp_path, **changes)
    assert files(tmp_path) == before
    larger = one(tmp_path, targets=["art", "sketch"]).run()
    assert {row["target"] for row in larger["rows"]} == {"art", "sketch"}


def test_ways_that_differ_in_their_pull_alone_and_networks_of_single_domains_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, domains = tmp_path / "pairs", tmp_path / "domains"
    one(pairs, tune={"naive": [{}, {"kept_decay": 10.0}]}).run()
    with pytest.raises(InputError, match=r"leave out .tune.naive per-domain at lr 0.01, pull 10"):
        one(pairs)
    one(pairs, tune={"naive": [{}, {"kept_decay": 10.0}, {"kept_decay": 30.0}]})
    offer_toys(monkeypatch)
    short: StudyConfig = sequence_config(sequence=["photo", "sketch"], methods=["none"], alone=True)
    assert "forward_transfer" in Study(short, domains, tiny_data()).run()["measures"][0]
    with pytest.raises(InputError, match=r"leave out .alone"):
        Study(sequence_config(sequence=["photo", "sketch"], methods=["none"]), domains, tiny_data())


def test_pairs_and_sequences_refuse_each_others_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_toys(monkeypatch)
    short: StudyConfig = sequence_config(sequence=["photo", "sketch"], methods=["none"])
    pairs, domains = tmp_path / "pairs", tmp_path / "domains"
    Study(short, pairs, tiny_data()).run_stage(SOURCE)  # what both have
    one(pairs).run_stage(MASK)
    with pytest.raises(
        InputError, match=rf"holds the study of pairs .{MASK}.*this is a sequence; choose another --out"
    ):
        Study(short, pairs, tiny_data())
    Study(short, domains, tiny_data()).run()
    for stage in (domains / "stages").iterdir():
        stage.unlink()
    with pytest.raises(InputError, match=r"holds a sequence .config.json.*this is the study of pairs"):
        one(domains)
    with pytest.raises(InputError, match=r"leave out .sequence photo,sketch"):
        Study(sequence_config(sequence=["photo", "art"], methods=["none"]), domains, tiny_data())
    assert len(Study(sequence_config(methods=["none"]), domains, tiny_data()).run()["tasks"]) == 3


def test_stages_done_one_by_one_are_collected_to_the_results_of_the_whole(tmp_path: Path) -> None:
    whole = one(tmp_path / "whole").run()
    study = one(tmp_path / "parts")

    def states() -> dict[str, str]:
        return {stage.name: study.state(stage) for stage in study.stages()}

    assert states() == {SOURCE: "ready", MASK: "waiting", PLAIN: "waiting", TUNE: "waiting"}
    with study.lab.stages.claims.stage(SOURCE):
        assert states()[SOURCE] == "running"
    assert study.run_stage(TUNE).startswith("source 0.")  # and what it needs
    assert states() == {SOURCE: "done", MASK: "done", PLAIN: "ready", TUNE: "done"}
    with pytest.raises(InputError, match=rf"1 of 4 stages are not done .{PLAIN}.; --list-stages"):
        study.collect()
    with pytest.raises(InputError, match=f"no stage 'tune-photo-sketch-none-seed0'.*nearest is '{PLAIN}'"):
        study.run_stage("tune-photo-sketch-none-seed0")
    assert not {"results.json", "config.json"} & set(files(study.folder))
    study.run_stage(PLAIN)
    assert without_seconds(study.collect()) == without_seconds(whole)
    assert without_seconds(json.loads((study.folder / "results.json").read_text())) == without_seconds(whole)


def test_every_stage_says_on_what_and_on_how_many_threads_it_was_computed(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    other = 1 if before > 1 else 2  # not 3: torch 2.14 crashes there on AVX-512, in the backward of so narrow a network
    study = one(tmp_path, threads=other)
    study.run_stage(TUNE)
    assert torch.get_num_threads() == before
    assert len(stages(tmp_path)) == 3
    for stage in study.stages():
        for planned in stage.planned if study.done(stage) else ():
            figures = study.lab.stages.figures(*planned)
            assert figures is not None
            assert (figures["threads"], figures["device"]) == (other, f"{os.uname().machine} CPU")
    assert isinstance(study, PairStudy)
