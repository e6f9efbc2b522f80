"""What every sequential method promises, whatever it learns."""

import copy
import dataclasses

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.methods import (
    CPG,
    FGGM,
    HAT,
    KSM,
    SPG,
    Binary,
    BinarySequence,
    FineTuning,
    LearnedMask,
    LowRank,
    PackNet,
    Piggyback,
    TopScores,
    TrainOptions,
    presets,
    sequential_methods,
)
from dwm_fast.methods._real_masks import RealMaskOptions
from dwm_fast.nn import Threshold

from .toys import conv_maker, conv_net, image_task, images_for_tests

POLICIES = ("frozen", "shared", "per-domain")
METHODS = {
    **{f"none {p}": FineTuning(TrainOptions(epochs=2, lr=0.01, batch_norm=p)) for p in POLICIES},
    "piggyback": Piggyback(options=RealMaskOptions(epochs=2, lr=0.01)),
    "piggyback ternary": Piggyback(
        Threshold(ternary=True), RealMaskOptions(epochs=2, lr=0.02, batch_norm="per-domain")
    ),
    "ksm": KSM(options=RealMaskOptions(epochs=2, lr=0.01, batch_norm="per-domain")),
    "ksm frozen": KSM(options=RealMaskOptions(epochs=2, lr=0.01)),
    **{f"spg {p}": SPG(epochs=2, batch_norm=p) for p in POLICIES},
    "packnet": PackNet(
        training=TrainOptions(2, 0.01, batch_norm="frozen"), retraining=TrainOptions(1, 0.01, batch_norm="frozen")
    ),
    **{f"hat {p}": HAT(TrainOptions(epochs=2, lr=0.01, batch_norm=p)) for p in ("frozen", "per-domain")},
    "top-scores": TopScores(options=RealMaskOptions(epochs=2, lr=0.01)),
    **{f"fggm {p}": FGGM(options=TrainOptions(epochs=2, lr=0.01, batch_norm=p)) for p in ("frozen", "per-domain")},
    "low-rank": LowRank(options=TrainOptions(epochs=2, lr=0.01, batch_norm="per-domain")),
    **{
        f"cpg {p}": CPG(training=TrainOptions(2, 0.01, batch_norm=p), pruning=TrainOptions(1, 0.01, batch_norm=p))
        for p in ("frozen", "per-domain")
    },
    **{
        f"binary {p}": BinarySequence(
            Binary(options=LearnedMask(epochs=4, lr=0.3, coefficient=0.1)),
            TrainOptions(epochs=2, lr=0.01, batch_norm=p),
        )
        for p in POLICIES
    },
}
EXACT = [name for name in METHODS if name.split()[0] in ("piggyback", "ksm", "packnet", "hat", "top-scores", "cpg")]
TASKS = (image_task("photo"), image_task("art", classes=3), image_task("sketch", classes=5))


def learned(name, tasks=TASKS, seed=0):
    learner = METHODS[name].learner(conv_maker, "fc")
    tasks = [dataclasses.replace(task, seed=seed) for task in tasks]
    learner.begin(tasks[0], conv_net())
    for task in tasks[1:]:
        learner.learn(task)
    return learner


def predictions(learner, names=("photo", "art", "sketch")):
    with torch.no_grad():
        return {(n, v): learner.network(n, v)(images_for_tests()) for n in names for v in learner.views}


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


@pytest.fixture(scope="module", params=METHODS)
def sequence(request):
    return request.param, learned(request.param)


def test_a_task_has_a_network_in_eval_mode_with_a_head_of_its_width(sequence):
    _, learner = sequence
    widths = {task: learner.network(task)(images_for_tests()).shape[1] for task in ("photo", "art", "sketch")}
    assert widths == {"photo": 4, "art": 3, "sketch": 5}
    assert not any(module.training for module in learner.network("art").modules())


def test_the_same_seeds_give_the_same_networks_and_others_give_others(sequence):
    name, learner = sequence
    torch.manual_seed(123)  # whatever the global generators hold
    assert_equal(predictions(learned(name)), predictions(learner))
    other = predictions(learned(name, seed=1))
    assert not torch.equal(other["sketch", "shared"], predictions(learner)["sketch", "shared"])


def test_learning_leaves_torchs_generator_alone(sequence):
    name, learner = sequence
    before = torch.get_rng_state()
    learned(name, TASKS[:2])
    learner.network("photo")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_learner_loaded_from_its_state_predicts_the_same_bits_and_goes_on_the_same(sequence, tmp_path):
    name, whole = sequence
    half = learned(name, TASKS[:2])
    state = half.state()
    assert all(type(t) is torch.Tensor and t.device.type == "cpu" and t.dtype != torch.bool for t in state.values())
    loaded = METHODS[name].learner(conv_maker, "fc")
    loaded.load_state(state)
    assert_equal(predictions(loaded, ("photo", "art")), predictions(half, ("photo", "art")))
    assert {n: loaded.bits(n) for n in ("photo", "art")} == {n: half.bits(n) for n in ("photo", "art")}
    loaded.learn(TASKS[2])
    assert_equal(predictions(loaded), predictions(whole))
    assert_equal(loaded.state(), whole.state())


def test_a_state_is_a_copy(sequence):
    _, learner = sequence
    before = predictions(learner)
    for tensor in learner.state().values():
        tensor.zero_()
    assert_equal(predictions(learner), before)


def test_the_network_it_began_with_is_left_as_it_was(sequence):
    name, _ = sequence
    network = conv_net()
    before = copy.deepcopy(network.state_dict())
    learner = METHODS[name].learner(conv_maker, "fc")
    learner.begin(TASKS[0], network)
    learner.learn(TASKS[1])
    assert_equal(network.state_dict(), before)


@pytest.mark.parametrize("name", EXACT)
def test_later_tasks_leave_earlier_predictions_bit_identical(name):
    learner = METHODS[name].learner(conv_maker, "fc")
    learner.begin(TASKS[0], conv_net())
    seen = predictions(learner, ("photo",))
    learner.learn(TASKS[1])
    after = predictions(learner, ("photo", "art"))
    assert_equal({k: after[k] for k in seen}, seen)
    learner.learn(TASKS[2])
    assert_equal(predictions(learner, ("photo", "art")), after)


@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith("binary")])
def test_the_masked_view_of_binary_forgets_nothing(name):
    learner = METHODS[name].learner(conv_maker, "fc")
    learner.begin(TASKS[0], conv_net())
    photo = learner.network("photo", "masked")(images_for_tests())
    learner.learn(TASKS[1])
    art = learner.network("art", "masked")(images_for_tests())
    learner.learn(TASKS[2])
    assert torch.equal(learner.network("photo", "masked")(images_for_tests()), photo)
    assert torch.equal(learner.network("art", "masked")(images_for_tests()), art)


@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith(("none", "spg", "fggm", "low-rank"))])
def test_methods_that_share_weights_do_change_earlier_predictions(name):
    """So that the promise above is one that a method can break."""
    learner = METHODS[name].learner(conv_maker, "fc")
    learner.begin(TASKS[0], conv_net())
    before = learner.network("photo")(images_for_tests())
    learner.learn(TASKS[1])
    assert not torch.equal(learner.network("photo")(images_for_tests()), before)


def test_figures_are_plain_numbers(sequence):
    name, _ = sequence
    learner = METHODS[name].learner(conv_maker, "fc")
    figures = {**learner.begin(TASKS[0], conv_net()), **learner.learn(TASKS[1])}
    assert all(value is None or isinstance(value, (int, float, bool)) for value in figures.values())


def test_progress_is_told_the_loss_at_every_training_step(sequence):
    name, _ = sequence
    told = []
    learner = METHODS[name].learner(conv_maker, "fc")
    learner.begin(TASKS[0], conv_net())
    learner.learn(dataclasses.replace(TASKS[1], progress=told.append))
    assert len(told) >= 2 * 3
    assert all(figures["loss"].ndim == 0 and not figures["loss"].requires_grad for figures in told)


def test_wrong_calls_are_named(sequence):
    name, learned_already = sequence
    learner = METHODS[name].learner(conv_maker, "fc")
    with pytest.raises(InputError, match="task 'art': learn was called before begin"):
        learner.learn(TASKS[1])
    with pytest.raises(InputError, match="task 'clipart' was not learned; learned so far: photo, art, sketch"):
        learned_already.network("clipart")
    with pytest.raises(InputError, match="view is 'other'; expected one of shared"):
        learned_already.network("photo", "other")
    with pytest.raises(InputError, match="begin was called after photo, art, sketch"):
        learned_already.begin(TASKS[0], conv_net())
    with pytest.raises(InputError, match="head 'conv1' is no Linear of the network; expected one of fc"):
        METHODS[name].learner(conv_maker, "conv1").begin(TASKS[0], conv_net())
    with pytest.raises(InputError, match="the state holds no task"):
        learner.load_state({})


@pytest.mark.parametrize("name", sorted(sequential_methods()))
def test_weights_are_pulled_by_the_fine_tuning_of_pairs_alone(name):
    method = sequential_methods()[name]
    sections = [f.name for f in dataclasses.fields(method) if isinstance(getattr(method, f.name), TrainOptions)]
    assert sections or name in ("piggyback", "ksm", "spg", "top-scores")  # which have loops and options of their own
    for section in sections:
        pulled = dataclasses.replace(getattr(method, section), kept_decay=0.0)
        with pytest.raises(InputError, match=r"kept_decay is 0\.0; expected None"):
            dataclasses.replace(method, **{section: pulled})


def test_a_name_is_learned_once():
    learner = learned("none shared", TASKS[:2])
    with pytest.raises(InputError, match="task 'art' was learned before"):
        learner.learn(TASKS[1])


def test_the_registry_has_all_methods_and_the_presets_of_the_papers():
    methods = sequential_methods()
    assert list(methods) == [
        "none",
        "piggyback",
        "ksm",
        "spg",
        "packnet",
        "binary",
        "hat",
        "top-scores",
        "fggm",
        "cpg",
        "low-rank",
    ]
    assert all(method.name == name for name, method in methods.items())
    assert {name: preset.name for name, preset in presets().items()} == {
        "piggyback-paper": "piggyback",
        "ksm-paper": "ksm",
        "spg-paper": "spg",
        "packnet-paper": "packnet",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_gpu_a_sequence_keeps_its_promises_there(name):
    """Captured steps: every task has a network, a loaded learner predicts the same, exact methods forget nothing."""

    def on_gpu(task):
        return dataclasses.replace(
            task,
            batches=lambda epoch: ((x.cuda(), y.cuda()) for x, y in task.batches(epoch)),
            loss=lambda network: float(network.eval()(images_for_tests().cuda()).detach().logsumexp(1).mean()),
        )

    def make(classes):
        return conv_maker(classes).cuda()

    def seen(learner):
        with torch.no_grad():
            return {n: learner.network(n)(images_for_tests().cuda()) for n in ("photo", "art")}

    learner = METHODS[name].learner(make, "fc")
    learner.begin(on_gpu(TASKS[0]), conv_net().cuda())
    learner.learn(on_gpu(TASKS[1]))
    before = seen(learner)
    loaded = METHODS[name].learner(make, "fc")
    loaded.load_state(learner.state())
    assert_equal(seen(loaded), before)
    learner.learn(on_gpu(TASKS[2]))
    assert all(output.isfinite().all() for output in seen(learner).values())
    if name in EXACT:
        assert_equal(seen(learner), before)
