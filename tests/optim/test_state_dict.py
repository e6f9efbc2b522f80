"""State dicts go into and out of torch.optim's own optimisers, and between compact and dense."""

import copy
import io

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.ops import use_backend
from dwm_fast.optim import FrozenAdamW, FrozenSGD

SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}
RULES = {
    "adamw": (FrozenAdamW, torch.optim.AdamW, {"lr": 0.1}),
    "adam": (FrozenAdamW, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.2}),
    "sgd": (FrozenSGD, torch.optim.SGD, SGD),
    "plain sgd": (FrozenSGD, torch.optim.SGD, {"lr": 0.1}),
}


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


def _parameters():
    return [torch.nn.Parameter(torch.linspace(-1, 1, n).view(s)) for n, s in ((6, (2, 3)), (5, (5,)))]


def _masks():
    return [torch.tensor([[True, False, True], [False, False, True]]), torch.arange(5) % 2 == 0]


def _train(optimizer, parameters, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def _through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("rule", RULES)
def test_training_goes_on_from_the_state_of_torch(rule):
    ours, theirs, options = RULES[rule]
    yours = _parameters()
    b = theirs(yours, foreach=False, **options)
    _train(b, yours, 3, seed=0)
    mine = copy.deepcopy(yours)
    a = ours(mine, lr=9.0)  # every option, the kind of weight decay too, comes with the state dict
    a.load_state_dict(_through_a_file(b.state_dict()))
    _train(a, mine, 3, seed=1)
    _train(b, yours, 3, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(mine, yours, strict=True))


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_torch_goes_on_from_our_state_on_the_free_lanes(rule, compact):
    ours, theirs, options = RULES[rule]
    mine = _parameters()
    decoupled = {} if rule != "adam" else {"decoupled_weight_decay": False}
    a = ours(mine, keep=_masks(), compact=compact, **options, **decoupled)
    _train(a, mine, 3, seed=0)
    yours = copy.deepcopy(mine)
    b = theirs(yours, foreach=False, lr=9.0)
    saved = a.state_dict()
    assert isinstance(saved["param_groups"][0]["lr"], float)
    b.load_state_dict(_through_a_file(saved))
    _train(a, mine, 3, seed=1)
    _train(b, yours, 3, seed=1)
    for p, q, keep in zip(mine, yours, _masks(), strict=True):
        assert torch.equal(p[~keep], q[~keep])


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize(("source", "target"), [(False, True), (True, False), (True, True)])
def test_compact_and_dense_load_each_other(rule, source, target):
    ours, _, options = RULES[rule]
    mine = _parameters()
    a = ours(mine, keep=_masks(), compact=source, **options)
    _train(a, mine, 3, seed=0)
    other = copy.deepcopy(mine)
    b = ours(other, keep=_masks(), compact=target, **options)
    _train(b, copy.deepcopy(other), 1, seed=4)
    b.load_state_dict(a.state_dict())
    _train(a, mine, 2, seed=1)
    _train(b, other, 2, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(mine, other, strict=True))


def test_loading_keeps_the_memory_that_a_captured_graph_reads():
    parameters = _parameters()
    optimizer = FrozenAdamW(parameters, lr=torch.tensor(0.1, dtype=torch.float64), keep=_masks())
    fresh = optimizer.state_dict()
    _train(optimizer, parameters, 2, seed=0)
    held = [(k, t, t.data_ptr()) for p in parameters for k, t in optimizer.state[p].items()]
    lr = optimizer.param_groups[0]["lr"]
    fresh["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(fresh)
    now = [(k, t, t.data_ptr()) for p in parameters for k, t in optimizer.state[p].items()]
    assert [(k, address) for k, _, address in held] == [(k, address) for k, _, address in now]
    assert not any(t.any() for _, t, _ in now)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_bf16_weights_keep_fp32_state_over_a_save():
    def make():
        p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        return p, FrozenAdamW([p])

    p, a = make()
    p.grad = torch.linspace(0, 1, 64).bfloat16()
    a.step()
    q, b = make()
    b.load_state_dict(_through_a_file(a.state_dict()))
    assert torch.equal(b.state[q]["exp_avg_sq"], a.state[p]["exp_avg_sq"])
    assert b.state[q]["exp_avg_sq"].dtype == torch.float32


def test_what_cannot_be_loaded_is_one_clear_error():
    parameters = _parameters()
    amsgrad = torch.optim.AdamW(parameters, amsgrad=True)
    with pytest.raises(InputError, match="amsgrad"):
        FrozenAdamW(parameters).load_state_dict(amsgrad.state_dict())
    plain = torch.optim.AdamW(parameters)
    _train(plain, parameters, 1, seed=0)
    other = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(5))]
    with pytest.raises(InputError, match="same model"):
        FrozenAdamW(other).load_state_dict(plain.state_dict())
