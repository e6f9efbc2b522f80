"""FrozenAdamW and FrozenSGD equal torch.optim on free lanes, step by step, and never write a kept one."""

import copy
import pickle

import pytest
import torch

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.ops import use_backend
from dwm_fast.optim import FrozenAdamW, FrozenSGD

SHAPES = [(3,), (17, 9), (4, 2, 3, 3)]
ADAM = [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}, {"maximize": True, "weight_decay": 0.0}]
SGD = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]


def _rule(name):
    """Our optimiser and torch's for one algorithm; torch's as single-tensor loops."""
    if name == "adamw":
        return FrozenAdamW, torch.optim.AdamW
    if name == "adam":
        return lambda p, **o: FrozenAdamW(p, decoupled_weight_decay=False, **o), torch.optim.Adam
    return FrozenSGD, torch.optim.SGD


CASES = [("adamw", o) for o in ADAM] + [("adam", o) for o in ADAM[1:]] + [("sgd", o) for o in SGD]


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


def _parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def _masks(fraction=0.5):
    generator = torch.Generator().manual_seed(11)
    return [torch.rand(s, generator=generator) < fraction for s in SHAPES]


def _give_gradients(generator, *lists):
    for i, shape in enumerate(SHAPES):
        grad = torch.randn(shape, generator=generator)
        for parameters in lists:
            parameters[i].grad = grad.to(parameters[i].dtype)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_free_lanes_are_bitwise_those_of_torch_at_every_step(name, options, compact):
    ours, theirs = _rule(name)
    mine, yours, masks = _parameters(), _parameters(), _masks()
    start = copy.deepcopy(mine)
    a = ours(mine, lr=0.03, keep=masks, compact=compact, **options)
    b = theirs(yours, lr=0.03, foreach=False, **options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(30):
        _give_gradients(generator, mine, yours)
        a.step()
        b.step()
        for p, q, old, keep in zip(mine, yours, start, masks, strict=True):
            assert torch.equal(p[~keep], q[~keep])
            assert torch.equal(p[keep], old[keep])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_without_masks_it_is_the_torch_optimiser(name, options):
    ours, theirs = _rule(name)
    mine, yours = _parameters(), _parameters()
    a, b = ours(mine, lr=0.03, **options), theirs(yours, lr=0.03, foreach=False, **options)
    generator = torch.Generator().manual_seed(5)
    for step in range(6):
        _give_gradients(generator, mine, yours)
        if step == 2:
            mine[1].grad = yours[1].grad = None  # such a parameter rests, and so does its step count
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, yours, strict=True))


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda p, **o: FrozenAdamW(p, lr=0.05, weight_decay=0.3, **o),
        lambda p, **o: FrozenSGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.3, **o),
    ],
)
def test_kept_weights_are_bit_identical_after_a_thousand_steps(make, dtype, compact):
    parameters, masks = _parameters(dtype=dtype), _masks()
    parameters[2].data = parameters[2].data.to(memory_format=torch.channels_last)
    before = [p.detach().clone() for p in parameters]
    optimizer = make(parameters, keep=dict(zip(parameters, masks, strict=True)), compact=compact)
    generator = torch.Generator().manual_seed(1)
    for step in range(1000):
        if step % 50 == 0:
            _give_gradients(generator, parameters)
            for p, keep in zip(parameters, masks, strict=True):
                p.grad[keep] = (float("nan"), float("inf"), -float("inf"))[step // 50 % 3]
        optimizer.step()
    for p, old, keep in zip(parameters, before, masks, strict=True):
        assert torch.equal(p[keep], old[keep])
        assert not torch.equal(p[~keep], old[~keep])
        assert torch.isfinite(p).all()


def test_compact_state_is_as_long_as_there_are_free_weights():
    parameters, masks = _parameters(), _masks(0.8)
    optimizer = FrozenAdamW(parameters, keep=masks, compact=True)
    _give_gradients(torch.Generator(), parameters)
    optimizer.step()
    for p, keep in zip(parameters, masks, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][name].shape == (int((~keep).sum()),)


def test_groups_schedulers_and_dtypes_are_kept_apart():
    parameters, reference = _parameters(), _parameters()
    low = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    keep = torch.tensor([True, False, True, False, True])
    mixed = {"params": [parameters[0], low], "keep": [None, keep]}
    ours = FrozenAdamW([mixed, {"params": parameters[1:], "lr": 0.5}], lr=0.1)
    theirs = torch.optim.AdamW([{"params": reference[:1]}, {"params": reference[1:], "lr": 0.5}], lr=0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        _give_gradients(generator, parameters, reference)
        low.grad = torch.ones_like(low)
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, reference, strict=True))
    assert torch.equal(low == 1, keep)
    assert ours.state[low]["exp_avg"].dtype == torch.float32


def test_a_tensor_learning_rate_is_followed_and_filled_by_schedulers():
    lr = torch.tensor(0.5, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = FrozenSGD([p], lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for expected in (-0.5, -0.75, -0.875):
        p.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
        assert p.item() == expected
    assert optimizer.param_groups[0]["lr"] is lr


def test_closures_and_the_gradient_scaler_work_as_with_torch():
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = FrozenSGD([p], lr=0.5, keep=[torch.tensor([True, False])])

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert p.tolist() == [1.0, 0.0]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value, after in ((1.0, -0.5), (float("inf"), -0.5)):
        optimizer.zero_grad()
        scaler.scale((p * torch.tensor([0.0, value])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert p.tolist() == [1.0, after]
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("compact", [False, True])
def test_a_copied_or_pickled_optimiser_goes_on_the_same(compact):
    parameters = _parameters()
    optimizer = FrozenAdamW(parameters, keep=_masks(), compact=compact)
    generator = torch.Generator().manual_seed(1)
    _give_gradients(generator, parameters)
    optimizer.step()
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    others = [c.param_groups[0]["params"] for c in copies]
    for _ in range(2):
        _give_gradients(generator, parameters, *others)
        for each in (optimizer, *copies):
            each.step()
    for other in others:
        assert all(torch.equal(p, q) for p, q in zip(parameters, other, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: FrozenAdamW(p, lr=-1.0), "lr is -1.0"),
        (lambda p: FrozenAdamW(p, lr=float("inf")), "lr is inf; expected a finite number"),
        (lambda p: FrozenAdamW(p, lr="1e-3"), "lr is '1e-3'"),
        (lambda p: FrozenAdamW(p, eps=float("nan")), "eps is nan"),
        (lambda p: FrozenAdamW(p, betas=0.9), "betas is 0.9"),
        (lambda p: FrozenAdamW(p, betas=("0.9", 0.99)), "betas is"),
        (lambda p: FrozenSGD(p, dampening=float("nan")), "dampening is nan"),
        (lambda p: FrozenAdamW(p, keep=torch.nn.ReLU()), "keep is a ReLU; expected"),
        (lambda p: FrozenAdamW(p, keep=torch.ones(3) > 0), "keep is a Tensor; expected"),
        (lambda p: FrozenAdamW(p, keep=[[True], None, None]), "a keep mask is a list"),
        (lambda p: FrozenAdamW(p, keep={"0": torch.ones(3) > 0}), r"have no names; give it model.named_parameters\(\)"),
        (lambda p: FrozenAdamW([("a", p[0]), ("b", p[1])], keep={"c": torch.ones(3) > 0}), "names 'c'.*: a, b"),
        (lambda p: FrozenAdamW(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: FrozenSGD(p, nesterov=True), "nesterov"),
        (lambda p: FrozenAdamW(p, keep=[None]), "1 masks for 3 parameters"),
        (lambda p: FrozenAdamW(p, keep={torch.zeros(1): torch.ones(1) > 0}), "none of the optimiser's"),
        (lambda p: FrozenAdamW(p, keep=[torch.ones(2) > 0, None, None]), "torch.bool"),
        (lambda p: FrozenAdamW(p, keep=[torch.ones(3), None, None]), "torch.bool"),
        (lambda p: FrozenAdamW([torch.zeros(2, dtype=torch.complex64)]), "complex64"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(make, message):
    with pytest.raises(InputError, match=message):
        make(_parameters())


def test_keep_masks_are_found_by_the_names_of_layers_and_parameters():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    masked = dwm.mask_model(net, dwm.GumbelSigmoid())
    with torch.no_grad():
        for logits in masked.mask_parameters():
            logits.normal_()
    keep = masked.keep_masks()
    half = {"2.bias": torch.tensor([True, False])}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    ours = FrozenAdamW(net.named_parameters(), lr=0.1, keep={**keep, **half})
    net(torch.randn(16, 4)).square().sum().backward()
    ours.step()
    unchanged = {name: p == before[name] for name, p in net.named_parameters()}
    for layer, mask in keep.items():
        assert torch.equal(unchanged[f"{layer}.weight"], mask)  # weight decay moves the rest
    assert unchanged["2.bias"].tolist() == [True, False]
    assert not unchanged["0.bias"].any()


def test_a_group_takes_its_masks_by_name_too():
    net = torch.nn.Linear(2, 1, bias=False)
    keep = {"weight": torch.tensor([[True, False]])}
    group = {"params": list(net.named_parameters()), "keep": keep}
    optimizer = FrozenSGD([group], lr=1.0)
    net.weight.grad = torch.ones(1, 2)
    before = net.weight.detach().clone()
    optimizer.step()
    assert (net.weight == before).tolist() == [[True, False]]
