"""A configuration: files in three formats say the same, and what is wrong in one is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwm_fast.errors import InputError
from dwm_fast.methods import TrainOptions
from dwm_fast.pacs.config import METHODS, StudyConfig, builtin_defaults, from_dict, load_config, real_defaults

ENTRIES = {
    "backbone": "resnet50",
    "data": "images",
    "image_size": 64,
    "sources": ["photo", "sketch"],
    "methods": ["none", "binary"],
    "seeds": [3, 4],
    "source": {"epochs": 2, "lr": 0.00003},
    "binary": {"source_budget": 0.2, "include": ["layer*"], "clip_norm": 1.0},
    "tune": {"binary": [{"lr": 0.0003, "batch_norm": "frozen"}, {"lr": 0.0003, "batch_norm": "shared"}]},
}
TOML = """
backbone = "resnet50"
data = "images"
image_size = 64
sources = ["photo", "sketch"]
methods = ["none", "binary"]
seeds = [3, 4]

[source]
epochs = 2
lr = 3e-5

[binary]
source_budget = 0.2
include = ["layer*"]
clip_norm = 1.0

[[tune.binary]]
lr = 3e-4
batch_norm = "frozen"

[[tune.binary]]
lr = 3e-4
batch_norm = "shared"
"""
YAML = """
backbone: resnet50
data: images
image_size: 64
sources: [photo, sketch]
methods: none, binary
seeds: [3, 4]
source: {epochs: 2, lr: 3e-5}     # YAML 1.1 reads 3e-5 as text
binary: {source_budget: 0.2, include: [layer*], clip_norm: 1}
tune:
  binary:
    - {lr: 3e-4, batch_norm: frozen}
    - {lr: 3e-4, batch_norm: shared}
"""


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("base", [builtin_defaults(), real_defaults(), from_dict(ENTRIES, real_defaults())])
@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_written_configuration_is_read_back(base: StudyConfig, form: str, tmp_path: Path) -> None:
    text = json.dumps(base.to_dict()) if form == "json" else yaml.safe_dump(base.to_dict())
    read = load_config(write(tmp_path, f"config.{form}", text), builtin_defaults())
    assert read == base
    assert load_config(tmp_path / f"config.{form}") == base


def test_three_formats_say_the_same(tmp_path: Path) -> None:
    files = {"a.toml": TOML, "a.yaml": YAML, "a.json": json.dumps(ENTRIES)}
    read = [load_config(write(tmp_path, name, text)) for name, text in files.items()]
    assert read[0] == read[1] == read[2]
    config = read[0]
    assert config.source == dataclasses.replace(real_defaults().source, epochs=2, lr=3e-5)
    assert config.binary.include == ("layer*",)
    assert [(way.lr, way.batch_norm) for way in config.tune["binary"]] == [(3e-4, "frozen"), (3e-4, "shared")]
    assert config.tune["naive"] == real_defaults().tune["naive"]
    assert config.edit == real_defaults().edit


def test_defaults_are_those_for_real_images_where_the_file_names_some(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "a.yaml", "seeds: 1\n")) == from_dict({"seeds": 1}, builtin_defaults())
    assert load_config(write(tmp_path, "b.yaml", "data: x\n")) == from_dict({"data": "x"}, real_defaults())
    assert load_config(tmp_path / "b.yaml", builtin_defaults()).backbone == "small"


def test_names_of_domains_and_text_lists_are_understood_and_repeats_left_out() -> None:
    config = from_dict({"sources": "A, photo,art_painting", "targets": ["S"], "seeds": "1,2,1"}, builtin_defaults())
    assert (config.sources, config.targets, config.seeds) == (("art", "photo"), ("sketch",), (1, 2))
    assert config.pairs() == [("art", "sketch"), ("photo", "sketch")]


def test_defaults_make_all_twelve_pairs_with_every_method() -> None:
    for config in (builtin_defaults(), real_defaults()):
        assert len(set(config.pairs())) == 12
        assert config.methods == METHODS
        assert all(s != t for s, t in config.pairs())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sourcs": "photo"}, "config: unknown entry 'sourcs'; expected some of data, splits"),
    ({"binary": {"learning_rate": 1}}, "config: binary: unknown entry 'learning_rate'; expected some of epochs, lr"),
    ({"binary": 3}, "config: binary is 3; expected a section"),
    ({"tune": {"magic": {}}}, "config: tune: unknown method 'magic'; expected some of none, naive"),
    ({"tune": 0.1}, "config: tune: expected a section for each method"),
    ({"tune": {"none": {"batch_norm": "off"}}}, "tune.none: batch_norm is 'off'; expected one of frozen"),
    ({"tune": {"none": {"lr": "fast"}}}, "config: tune.none.lr is 'fast'; expected a number"),
    ({"tune": {"none": [{"epochs": 1}, {"epochs": 2}]}}, "tune.none has 2 ways; .*same batch_norm"),
    ({"tune": {"none": []}}, "tune.none has 0 ways; expected at least one"),
    ({"tune": {"none": {"kept_decay": 5}}}, "tune.none: kept_decay is 5.0; expected none"),
    ({"source": {"kept_decay": 5}}, "source: kept_decay is 5.0; expected none"),
    ({"methods": "none,magic"}, "methods: given none, magic; expected some of"),
    ({"inits": "S_middle"}, "inits: given S_middle; expected some of S_start"),
    ({"methods": []}, "methods: given none; expected"),
    ({"sources": "photo", "targets": "photo"}, "nothing to do: .*two different domains"),
    ({"sources": "clipart"}, "clipart"),
    ({"seeds": "a"}, "config: seeds is 'a'; expected a whole number"),
    ({"seeds": [0.5]}, "config: seeds is 0.5; expected a whole number"),
    ({"seeds": []}, r"nothing to do: seeds \[\]"),
    ({"image_size": "big"}, "config: image_size is 'big'; expected a whole number"),
    ({"image_size": 0}, "image_size=0; expected a whole number of at least 1"),
    ({"batch_size": True}, "config: batch_size is True; expected a whole number"),
    ({"crop_scale": 1.5}, "crop_scale=1.5; expected a fraction"),
    ({"tune_scale": 0}, "tune_scale=0.0; expected a fraction"),
    ({"tune_size": 0}, "tune_size=0; expected a whole number of at least 1"),
    ({"crop_scale": None}, "config: crop_scale is None; expected a number"),
    ({"amp": "fp8"}, "amp=fp8; expected auto, bf16 or off"),
    ({"backbone": 18}, "config: backbone is 18; expected text"),
    ({"tau": 0}, "tau=0.0; expected a temperature above 0"),
    ({"edit_threshold": -1}, "edit_threshold=-1.0; expected a number of standard deviations above 0"),
    ({"edit_spread": -1}, "edit_spread=-1.0; expected a number of at least 0"),
    ({"edit": {"decay": 2}}, "edit: decay is 2.0; expected a fraction of the steps"),
    ({"deviations": -1}, "deviations=-1.0; expected"),
    ({"source": {"lr": -1}}, "source: lr is -1.0; expected a rate above 0"),
    ({"source": {"optimizer": "lion"}}, "source: optimizer is 'lion'; expected one of adamw, sgd"),
    ({"edit": {"epochs": -3}}, "edit: epochs is -3; expected"),
    ({"edit": {"epochs": 1.5}}, "config: edit.epochs is 1.5; expected a whole number"),
    ({"splits": "lists"}, "splits=lists without data; .*give --data PATH"),
]


@pytest.mark.parametrize(("entries", "message"), WRONG, ids=lambda v: json.dumps(v) if isinstance(v, dict) else "")
def test_what_is_wrong_is_named_in_one_line(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_dict(entries, builtin_defaults())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "sources = [", r"config: .*a.toml: "),
        ("a.yaml", "a: [1\nb: }", r"config: .*a.yaml: "),
        ("a.json", "{'seeds': 1}", r"config: .*a.json: "),
        ("a.yaml", "- photo\n- art\n", "holds list; expected entries such as"),
        ("a.yaml", "", "holds NoneType; expected entries"),
        ("a.yaml", "\x00\x01", "config: .*a.yaml: "),
    ],
)
def test_files_that_hold_no_configuration_are_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(write(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config: cannot read .*nowhere.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match=r"config: cannot read .*: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(InputError, match=r"config: .*binary.yaml: "):
        load_config(tmp_path / "binary.yaml")


def test_two_ways_of_a_method_are_told_apart_by_policy_or_rate() -> None:
    ways = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.1, "batch_norm": "frozen"}]
    config = from_dict({"tune": {"none": ways}}, builtin_defaults())
    assert len(config.tune["none"]) == 3
    assert all(isinstance(way, TrainOptions) for way in config.tune["none"])


@pytest.mark.parametrize("name", ["a.toml", "a.yaml", "a.json"])
def test_a_byte_order_mark_and_names_with_spaces_are_read_in_every_format(name: str, tmp_path: Path) -> None:
    given = {"data": "my images/PACS – copy", "sources": "photo ,  art_painting", "seeds": [3]}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    text = "\n".join(lines) if name == "a.toml" else json.dumps(given, ensure_ascii=False)  # JSON is YAML too
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        read = load_config(tmp_path / name)
        assert (read.data, read.sources, read.seeds) == (given["data"], ("photo", "art"), (3,))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: &a [*a]\n", r"'\*a' is an alias; write out"),
        ("a.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nsources: [*b, *b]\n", "is an alias"),
        ("a.json", "[" * 100_000, "nested too deeply|a.json: "),
        ("a.json", '{"a":' * 100_000, "nested too deeply|a.json: "),
        ("a.yaml", "[" * 20_000, "nested too deeply|a.yaml: "),
        ("a.toml", f"a = {'[' * 20_000}", "nested too deeply|a.toml: "),
        ("a.json", json.dumps({"tau": int("9" * 400)}), "config: tau is 9.*; expected a number"),
        ("a.json", '{"seeds": [' + "9" * 5000 + "]}", "a.json: "),
        ("a.json", json.dumps({"backbone": ["x" * 1000] * 100}), "config: backbone is .*; expected text"),
        ("a.json", json.dumps({"seeds": "x" * 10_000}), "config: seeds is 'x.*; expected a whole number"),
        ("a.yaml", "# " + "x" * (1 << 20) + "\nseeds: 1\n", "larger than 1,048,576 bytes"),
        ("a.json", '{"tau": 1e999}', "config: tau is inf; expected a number"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_hostile_file_of_settings_is_one_short_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(write(tmp_path, name, text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_path_that_no_system_has_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "a\0b.yaml", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="config: cannot read") as caught:
            load_config(path)
        assert "\n" not in str(caught.value)
