"""Methods from outside the package: registered, named by a file, offered by an installed package, or refused."""

import importlib.metadata
from dataclasses import dataclass

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.methods import (
    FoundMask,
    SequenceLearner,
    TrainOptions,
    load_method,
    pair_methods,
    register_method,
    registry,
    seeded,
    sequential_methods,
    train_task,
)

from .toys import conv_maker, conv_net, image_task, images_for_tests

FILE = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Mine:
    name = "mine"
    def find(self, model, task): return None
class Other: pass
"""


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    load_method.cache_clear()


@dataclass(frozen=True)
class Both:
    epochs: int = 1
    name = "both"

    def find(self, model, task):
        return FoundMask(None)

    def learner(self, network, head):
        return HeadsOnly(network, head, self)


class HeadsOnly(SequenceLearner):
    """Trains the head and two bits; remembers one number."""

    MEMORY = ("count",)

    def learn(self, task):
        with seeded(task):
            network = self.fresh(task)
            fixed = [name for name, _ in network.named_parameters() if not name.startswith("fc")]
            train_task(network, task, TrainOptions(self.method.epochs, batch_norm="frozen"), fixed=fixed)
        self.add_task(task, network)
        self.task_masks[task.name] = {"keep": {"conv1": torch.rand(6, 3, 3, 3) < 0.5}}
        self.memory["count"] = {"tasks": torch.tensor(len(self.classes))}
        return {"count": len(self.classes)}


def test_a_registered_method_is_offered_for_what_it_has_functions_for():
    assert register_method(Both) is Both
    assert sequential_methods()["both"] == pair_methods()["both"] == Both()
    register_method(Both(epochs=7))  # options of one's own
    assert sequential_methods()["both"].epochs == 7


def test_a_subclass_of_the_learner_has_network_state_bits_and_bank_for_nothing():
    learner = Both(epochs=2).learner(conv_maker, "fc")
    assert learner.begin(image_task("photo"), conv_net()) == {}
    assert learner.learn(image_task("art", classes=3)) == {"count": 2}
    x = images_for_tests()
    assert learner.network("art")(x).shape == (5, 3)
    assert learner.bits("art") == 6 * 3 * 3 * 3
    again = Both().learner(conv_maker, "fc")
    again.load_state(learner.state())
    assert torch.equal(again.network("art")(x), learner.network("art")(x))
    assert torch.equal(again.masks("art")["conv1"], learner.masks("art")["conv1"])
    assert again.memory["count"]["tasks"] == 2
    bank = learner.bank()
    bank.activate("art")
    kept = learner.network("art")
    with torch.no_grad():
        kept.conv1.weight.mul_(learner.masks("art")["conv1"])
        assert torch.equal(bank(x), kept(x))


def test_a_learner_without_learn_says_so():
    with pytest.raises(NotImplementedError, match="SequenceLearner has no learn"):
        SequenceLearner(conv_maker, "fc").learn(image_task("photo"))


def test_a_file_is_read_once_and_its_method_goes_by_its_name(tmp_path):
    file = tmp_path / "my methods.py"
    file.write_text(FILE)
    assert load_method(f"{file}:Mine") == "mine"
    file.unlink()
    assert load_method(f"{file}:Mine") == "mine"
    assert list(pair_methods())[-1] == "mine"
    assert "mine" not in sequential_methods()
    assert load_method("tests.methods.test_registry:Both") == "both"


def frozen(title, **attributes):
    return dataclass(frozen=True)(type(title, (Both,), attributes))


def refused(made, message):
    with pytest.raises(InputError, match=message):
        register_method(made)


def test_what_is_no_method_is_refused_in_one_line():
    class Bare:
        name = "bare"

    refused(Bare, "Bare is no dataclass")
    refused(dataclass(Bare), "Bare has neither find.* nor learner")
    refused(frozen("Odd", name="a/b"), "Odd.name is 'a/b'; expected letters")
    refused(frozen("Taken", name="ksm"), "'ksm', a method of the library")
    refused(frozen("Taken", name="naive"), "'naive', a method of the library")
    register_method(Both)
    refused(frozen("Twin"), "Twin.name is 'both', as of .*test_registry.Both")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("Mine", "method 'Mine'; expected a file and a class, such as fggm.py:FGGM"),
        ("nowhere.py:Mine", "method file nowhere.py: no such file"),
        ("no.such.module:Mine", "method module no.such.module: ModuleNotFoundError"),
        ("{0}/good.py:Yours", "good.py has no Yours; it has Mine"),
        ("{0}/bad.py:Mine", "bad.py: ZeroDivisionError: division by zero"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_line(tmp_path, reference, message):
    (tmp_path / "good.py").write_text(FILE)
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(InputError, match=message) as error:
        load_method(reference.format(tmp_path))
    assert "\n" not in str(error.value)


def test_an_installed_package_offers_its_methods_and_a_broken_one_costs_a_warning(monkeypatch):
    module = "tests.methods.test_registry"
    points = [
        importlib.metadata.EntryPoint("both", f"{module}:Both", registry.GROUP),
        importlib.metadata.EntryPoint("gone", f"{module}:Gone", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "dwm_fast.methods" else [])
    registry._load_entry_points.cache_clear()
    with pytest.warns(RuntimeWarning, match="method 'gone' of tests.methods.test_registry:Gone is left out"):
        assert list(pair_methods())[-1] == "both"
    assert "both" in sequential_methods()


def test_keeping_everything_frozen_changes_no_prediction():
    """So that `keep` and `fixed` of `train_task` are seen to be followed."""
    network = conv_net()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    keep = {"conv1": torch.ones(6, 3, 3, 3, dtype=torch.bool)}
    with pytest.raises(InputError, match=r"kept_decay is 1\.0; expected None"):
        train_task(network, image_task("photo"), TrainOptions(1, 0.1, kept_decay=1.0), keep=keep)
    train_task(network, image_task("photo"), TrainOptions(1, 0.1, batch_norm="frozen"), keep=keep, fixed=["fc.bias"])
    same = {name for name, tensor in network.state_dict().items() if torch.equal(tensor, before[name])}
    assert {"conv1.weight", "fc.bias", "bn1.weight"} <= same
    assert "fc.weight" not in same
