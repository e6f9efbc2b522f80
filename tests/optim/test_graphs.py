"""capture_step: one graph replay per training step on a GPU, the same step eagerly elsewhere."""

import pytest
import torch

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.graphs import CaptureError, capture_step
from dwm_fast.nn import GumbelSigmoid, mask_model
from dwm_fast.optim import FrozenAdamW, FrozenSGD, MaskAdam

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


class Net(torch.nn.Module):
    """One masked linear layer over a frozen weight, drawn in one operation."""

    def __init__(self, device):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.randn(16, 32, device=device)
        self.logits = torch.nn.Parameter(torch.zeros(16, 32, device=device))
        self.register_buffer("rng_state", torch.tensor([5, 0], device=device))
        self.register_buffer("tau", torch.tensor(1.0, device=device))
        self.sample = ops.sample

    def mask_parameters(self):
        return [self.logits]

    def attach_recorder(self, recorder):
        self.sample = recorder.sample

    def forward(self, x):
        state = ops.advance(self.rng_state)
        (masked,), _, _ = self.sample([self.logits], [self.weight], state, self.tau)
        return torch.nn.functional.linear(x, masked)


def _mask_training(device, batches):
    """Losses and logits of a masked net trained by captured steps, from a restored start."""
    net = Net(device)
    optimizer = MaskAdam(net, lr=0.05, coefficient=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def step(x):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    run = capture_step(step, batches[0], restore=(net, optimizer))
    assert run.captured == (device == "cuda")
    losses = []
    for x in batches:
        losses.append(run(x).clone())
        schedule.step()
    return torch.stack(losses), net, optimizer, step


@pytest.mark.parametrize("device", DEVICES)
def test_captured_steps_and_eager_steps_agree_from_the_same_state(device):
    batches = [torch.randn(8, 32, device=device) for _ in range(5)]
    losses, net, optimizer, _ = _mask_training(device, batches)
    other = Net(device)
    eager = MaskAdam(other, lr=0.05, coefficient=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(eager, 0.9)
    for x, expected in zip(batches, losses, strict=True):
        eager.zero_grad()
        loss = other(x).square().mean()
        loss.backward()
        eager.step()
        schedule.step()
        assert torch.equal(loss, expected)
    assert torch.equal(net.logits, other.logits)
    assert torch.equal(net.rng_state, other.rng_state)
    assert optimizer.state_dict()["state"][0]["step"] == len(batches)


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_whose_penalty_nobody_asks_for_is_captured(device):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    masked = mask_model(plain, GumbelSigmoid(), seed=3).to(device).train()
    optimizer = MaskAdam(masked, lr=0.05, coefficient=1.0)

    def step(x):
        optimizer.zero_grad()
        loss = masked(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    x = torch.ones(8, 32, device=device)
    last = step(x).detach()
    run = capture_step(step, x)
    assert run.captured == (device == "cuda")
    before = [p.detach().clone() for p in masked.mask_parameters()]
    assert run(x) != last
    assert all((p != b).any() for p, b in zip(masked.mask_parameters(), before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_each_call_draws_new_masks(device):
    net = Net(device)
    run = capture_step(lambda x: net(x), torch.eye(32, device=device), restore=[net])
    first, second = run(torch.eye(32, device=device)).clone(), run(torch.eye(32, device=device)).clone()
    assert not torch.equal(first, second)
    assert net.rng_state.tolist() == [5, 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("make", [FrozenAdamW, lambda p, **o: FrozenSGD(p, momentum=0.9, **o)])
def test_frozen_steps_are_captured_and_kept_weights_stay(device, make, compact):
    layer = torch.nn.Linear(32, 8, device=device)
    before, keep = layer.weight.detach().clone(), torch.rand(8, 32) < 0.5
    optimizer = make(layer.parameters(), lr=0.1, keep={layer.weight: keep}, compact=compact)

    def step(x):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    x = torch.randn(4, 32, device=device)
    run = capture_step(step, x, restore=(layer, optimizer))
    assert torch.equal(layer.weight, before)
    for _ in range(3):
        run(x)
    changed = (layer.weight != before).cpu()
    assert not changed[keep].any()
    assert changed[~keep].all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_no_optimiser_waits_for_the_device():
    net, layer = Net("cuda"), torch.nn.Linear(32, 8, device="cuda")
    keep = {layer.weight: torch.rand(8, 32) < 0.5}
    every = [
        MaskAdam(net, coefficient=0.1),
        FrozenAdamW(layer.parameters(), keep=keep),
        FrozenAdamW(layer.parameters(), keep=keep, compact=True),
        FrozenSGD(layer.parameters(), momentum=0.9, keep=keep),
    ]
    x = torch.randn(4, 32, device="cuda")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            (net(x).square().mean() + layer(x).square().mean()).backward()
            for optimizer in every:
                optimizer.step()
                optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_step_that_waits_is_named_and_leaves_the_state_as_it_was():
    net = Net("cuda")
    with pytest.raises(CaptureError, match=r"\.item\(\)"):
        capture_step(lambda x: net(x).sum().item(), torch.ones(4, 32, device="cuda"), restore=[net])
    assert net.rng_state.tolist() == [5, 0]
    assert torch.cuda.get_sync_debug_mode() == 0


def test_a_batch_of_another_shape_is_one_clear_error():
    run = capture_step(lambda x: x * 2, torch.zeros(4, 2))
    with pytest.raises(InputError, match="drop_last"):
        run(torch.zeros(3, 2))
    assert run.eager(torch.ones(3, 2)).shape == (3, 2)


def test_outputs_of_any_nesting_come_back_detached():
    w = torch.ones(2, requires_grad=True)
    out = capture_step(lambda x: {"a": [x * w, 3]}, torch.ones(2))(torch.ones(2))
    assert out["a"][1] == 3
    assert not out["a"][0].requires_grad


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3,), {}, "takes tensors"),
        ((), {}, "no example and no device"),
        ((torch.zeros(1),), {"warmup": 1}, "warmup"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(arguments, options, message):
    with pytest.raises(InputError, match=message):
        capture_step(lambda *x: None, *arguments, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_capture_that_cuda_breaks_off_leaves_torch_as_it_was():
    x, calls = torch.ones(4, device="cuda"), []

    def step(x):
        calls.append(None)
        if len(calls) > 3:  # the warm-up is over
            torch.cuda.synchronize()
        return x * torch.rand_like(x)

    held = torch.cuda.memory_allocated()
    with pytest.raises(CaptureError, match="capturing"):  # CUDA's first word, not that of the capture's end
        capture_step(step, x)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == held
    torch.cuda.manual_seed(3)
    first = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    run = capture_step(lambda x: x * torch.rand_like(x), x)
    assert not torch.equal(run(x).clone(), run(x).clone())
