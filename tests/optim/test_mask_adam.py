"""MaskAdam takes the steps that autograd and torch's Adam take, without forming a gradient of the logits."""

import copy

import pytest
import torch

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.optim import MaskAdam

SHAPES = [(6, 4), (3, 6)]
EPS = 1e-15


@pytest.fixture(autouse=True)
def _reference():
    with ops.use_backend("reference"):
        yield


class Net:
    """Two masked linear layers, written out; what MaskAdam asks of a masked model and no more."""

    def __init__(self, mode=ops.Mode.GUMBEL_HARD, dtype=None):
        generator = torch.Generator().manual_seed(0)
        self.mode, self.dtype = mode, dtype
        self.weights = [torch.randn(s, generator=generator) for s in SHAPES]
        self.logits = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
        self.rng_state, self.tau = torch.tensor([42, 0]), torch.tensor(0.8)
        self.sample = ops.sample

    def mask_parameters(self):
        return iter(self.logits)

    def attach_recorder(self, recorder):
        self.sample = ops.sample if recorder is None else recorder.sample

    def loss(self, x, step_offset=0):
        """Mean square output and penalty; draws from a copy of the noise state and advances it."""
        state = ops.advance(self.rng_state)
        masked, _, penalty = self.sample(
            self.logits,
            self.weights,
            state,
            self.tau,
            mode=self.mode,
            thresholds=[0.0, 0.1],
            step_offset=step_offset,
            dtype=self.dtype,
        )
        for w in masked:
            x = torch.relu(torch.nn.functional.linear(x.to(w.dtype), w))
        return x.float().square().mean(), penalty


def _batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]


def _torch_adam(net, **options):
    return torch.optim.AdamW(net.logits, lr=1e-2, eps=EPS, foreach=False, **{"weight_decay": 0.0, **options})


def _close(ours, theirs, exact):
    """Within twice the error of an independent fp32 run against fp64."""
    for a, b, c in zip(ours, theirs, exact, strict=True):
        budget = 2 * ((b.double() - c).abs().max() + torch.finfo(torch.float32).eps * c.abs().max())
        assert (a.double() - c).abs().max() <= budget


@pytest.mark.parametrize("mode", [m for m in ops.Mode if m != ops.Mode.KEEP])
def test_the_steps_are_those_of_autograd_and_torch(mode):
    mine, yours = Net(mode), Net(mode)
    ours, theirs = MaskAdam(mine, weight_decay=0.1), _torch_adam(yours, weight_decay=0.1)
    for x in _batches():
        for net, optimizer in ((mine, ours), (yours, theirs)):
            optimizer.zero_grad()
            net.loss(x)[0].backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, yours.logits, strict=True))
    assert all(p.grad.share.value is None for p in mine.logits)


@pytest.mark.parametrize("how", ["coefficient", "tensor", "loss"])
def test_the_penalty_enters_by_coefficient_or_by_the_loss(how):
    nets = {name: Net() for name in ("ours", "torch", "exact")}
    nets["exact"].logits = [torch.nn.Parameter(x.detach().double()) for x in nets["exact"].logits]
    nets["exact"].weights = [w.double() for w in nets["exact"].weights]
    nets["exact"].tau = nets["exact"].tau.double()
    coefficient = {"coefficient": 0.3, "tensor": torch.tensor(0.3), "loss": 0.0}[how]
    optimizers = {n: _torch_adam(net) for n, net in nets.items() if n != "ours"}
    optimizers["ours"] = MaskAdam(nets["ours"], eps=EPS, coefficient=coefficient)
    for x in _batches():
        for name, net in nets.items():
            optimizers[name].zero_grad()
            loss, penalty = net.loss(x.double() if name == "exact" else x)
            if name != "ours" or how == "loss":
                loss = loss + 0.3 * penalty
            loss.backward()
            optimizers[name].step()
    _close(*(net.logits for net in nets.values()))


def test_several_backward_passes_add_up():
    mine, yours = Net(), Net()
    ours, theirs = MaskAdam(mine, coefficient=0.3), _torch_adam(yours)
    for x in _batches(3):
        for net, optimizer in ((mine, ours), (yours, theirs)):
            optimizer.zero_grad()
            for part, offset in zip(x.chunk(2), (0, 5), strict=True):
                net.loss(part, offset)[0].backward()
        (0.3 * torch.cat([torch.sigmoid(p).flatten() for p in yours.logits]).mean()).backward()
        ours.step()
        theirs.step()
    for a, b in zip(mine.logits, yours.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_order_forward_zero_grad_backward_works_too():
    nets = Net(), Net()
    optimizers = [MaskAdam(net) for net in nets]
    for x in _batches(3):
        optimizers[0].zero_grad()
        nets[0].loss(x)[0].backward()
        optimizers[0].step()
        loss = nets[1].loss(x)[0]
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].logits, nets[1].logits, strict=True))


def test_a_gradient_that_reaches_the_logits_another_way_is_added():
    mine, yours = Net(), Net()
    for net, optimizer in ((mine, MaskAdam(mine)), (yours, _torch_adam(yours))):
        (net.loss(_batches()[0])[0] + sum(p.square().sum() for p in net.logits)).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, yours.logits, strict=True))


def test_a_layer_that_was_not_reached_still_feels_the_penalty():
    net = Net()
    before = [p.detach().clone() for p in net.logits]
    optimizer = MaskAdam(net, coefficient=0.3)
    masked, _, _ = net.sample(net.logits, net.weights, net.rng_state, net.tau)
    masked[0].sum().backward()
    optimizer.step()
    torch.testing.assert_close(net.logits[1].detach(), before[1] - 1e-2)  # Adam's first step: -lr * sign


def test_bf16_masked_weights_give_bf16_gradients_and_fp32_logits():
    net = Net(dtype=torch.bfloat16)
    optimizer = MaskAdam(net)
    for x in _batches(3):
        optimizer.zero_grad()
        net.loss(x)[0].backward()
        optimizer.step()
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in net.logits)


def test_tiny_gradients_move_logits_by_the_learning_rate():
    net = Net()
    start = copy.deepcopy(net.logits)
    optimizer = MaskAdam(net, lr=1e-2)
    (1e-9 * net.loss(_batches()[0])[0]).backward()
    optimizer.step()
    moved = torch.cat([(a - b).detach().abs().flatten() for a, b in zip(net.logits, start, strict=True)])
    assert moved[moved > 0].median() == pytest.approx(1e-2, rel=1e-2)


def test_weights_that_train_along_get_their_gradient():
    nets = Net(), Net()
    MaskAdam(nets[0])
    for net in nets:
        net.weights[0].requires_grad_()
        net.loss(_batches()[0])[0].backward()
    assert torch.equal(nets[0].weights[0].grad, nets[1].weights[0].grad)


def test_without_folding_it_is_adam_on_the_gradients_of_the_logits():
    mine, yours = Net(), Net()
    ours, theirs = MaskAdam(mine, fold=False), _torch_adam(yours)
    for x in _batches(3):
        for net, optimizer in ((mine, ours), (yours, theirs)):
            optimizer.zero_grad()
            net.loss(x)[0].backward()
            optimizer.step()
    assert mine.sample is ops.sample
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, yours.logits, strict=True))


def test_its_state_goes_into_torch_and_back():
    mine = Net()
    ours = MaskAdam(mine)
    for x in _batches(3):
        ours.zero_grad()
        mine.loss(x)[0].backward()
        ours.step()
    theirs = _torch_adam(mine)
    theirs.load_state_dict(ours.state_dict())
    other = MaskAdam(Net())
    other.load_state_dict(theirs.state_dict())
    for p, q in zip(mine.logits, other.param_groups[0]["params"], strict=True):
        assert torch.equal(ours.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"])
        assert other.state[q]["step"] == 3


def test_two_networks_are_two_groups_with_one_penalty_over_both():
    nets = [Net(), Net()]
    optimizer = MaskAdam(nets, coefficient=0.3)
    assert len(optimizer.param_groups) == 2
    start = [p.detach().clone() for p in nets[1].logits]
    nets[0].loss(_batches()[0])[0].backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(nets[1].logits, start, strict=True))


@pytest.mark.parametrize("fold", [True, False])
def test_the_models_zero_grad_does_what_the_optimisers_does_and_nothing_piles_up(fold):
    x, y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3

    def train(cleared_by):
        torch.manual_seed(0)
        plain = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        masked = dwm_fast.mask_model(plain, dwm_fast.Threshold(), seed=0)
        opt = MaskAdam(masked, lr=0.1, eps=1.0, fold=fold)
        for _ in range(20):
            {"model": masked, "opt": opt}[cleared_by].zero_grad()
            torch.nn.functional.cross_entropy(masked(x), y).backward()
            opt.step()
        assert all(len(recorder.records) <= 2 for recorder in opt._recorders)
        return list(masked.mask_parameters())

    assert all(map(torch.equal, train("opt"), train("model")))


def test_misuse_is_one_clear_error():
    net = Net()
    with pytest.raises(InputError, match="fold=True"):
        MaskAdam(net, coefficient=1.0, fold=False)
    lonely = MaskAdam(net, coefficient=1.0)
    net.attach_recorder(None)
    net.loss(_batches()[0])[0].backward()
    with pytest.raises(InputError, match="no draw was recorded"):
        lonely.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskAdam(torch.nn.Linear(2, 2)), "got a Linear; expected a MaskedModel"),
        (lambda: MaskAdam(torch.nn.Sequential(torch.nn.Linear(2, 2))), "got a Sequential; expected a MaskedModel"),
        (lambda: MaskAdam(Net().mask_parameters()), "expected a MaskedModel.*not its parameters"),
        (lambda: MaskAdam(Net().logits), "got a Parameter; expected a MaskedModel"),
        (lambda: MaskAdam([]), "empty list"),
        (lambda: MaskAdam([Net(), torch.nn.ReLU()]), "got a ReLU"),
        (lambda: MaskAdam(_Wrapped(Net())), "give it its .module"),
        (lambda: MaskAdam(Net(), coefficient=float("nan")), "coefficient is nan"),
        (lambda: MaskAdam(Net(), coefficient="1"), "coefficient is '1'"),
        (lambda: MaskAdam(Net(), lr=float("inf")), "lr is inf"),
    ],
)
def test_a_wrong_source_or_number_is_one_clear_error(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


class _Wrapped:
    """A network in a wrapper that passes no attributes on, as DistributedDataParallel is."""

    def __init__(self, module):
        self.module = module
