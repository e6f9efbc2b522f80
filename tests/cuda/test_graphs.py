"""capture_step on a GPU: whole steps replayed, and nothing lost where a step cannot be one graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.graphs import CaptureError, capture_step
from dwm_fast.methods._loop import FastStep
from dwm_fast.ops.draw import Mode
from dwm_fast.optim import FrozenAdamW, FrozenSGD, MaskAdam

pytestmark = pytest.mark.filterwarnings("ignore:dwm_fast. backend 'cuda' is not used")


def masked_network():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 2))
    return dwm.mask_model(plain, dwm.GumbelSigmoid(init=1.0), seed=3).to("cuda:0").train()


def batches(count, device="cuda:0"):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 5, 5, generator=generator).to(device) for _ in range(count)]


def training(masked, optimizer):
    def step(x):
        optimizer.zero_grad()
        loss = masked(x).square().mean() + 0.1 * masked.sparsity_penalty()
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("fold", [True, False])
def test_replayed_steps_are_eager_steps(gpu, fold):
    runs = []
    for captured in (False, True):
        masked = masked_network()
        optimizer = MaskAdam(masked, lr=0.05, fold=fold)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = training(masked, optimizer)
        xs = batches(3)
        run = capture_step(step, xs[0], restore=(masked, optimizer)) if captured else step
        losses = []
        for x in xs:
            losses.append(float(run(x).detach().cpu()))
            schedule.step()
        runs.append((losses, [p.detach().cpu() for p in masked.mask_parameters()], masked.rng_state.tolist()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert runs[0][2] == runs[1][2]


def test_nothing_is_computed_or_waited_for_by_a_replay_but_the_copy_of_the_batch(gpu):
    masked = masked_network()
    optimizer = MaskAdam(masked, lr=0.05)
    xs = batches(2)
    run = capture_step(training(masked, optimizer), xs[0], restore=(masked, optimizer))
    assert run.captured
    assert {x.stream.cuda_stream for x in gpu.launches if x.captured} != {gpu.defaults[0].cuda_stream}
    gpu.syncs.clear(), gpu.copies.clear()
    count = len(gpu.launches)
    run(xs[1])
    assert len(gpu.launches) == count
    assert not gpu.syncs
    assert not gpu.copies
    assert gpu.log[-1] == ("replay", gpu.defaults[0])


@pytest.mark.parametrize("make", [FrozenAdamW, lambda p, **o: FrozenSGD(p, momentum=0.9, **o)])
@pytest.mark.parametrize("compact", [False, True])
def test_kept_weights_stay_through_replays(gpu, make, compact):
    torch.manual_seed(0)
    layer = nn.Linear(12, 6).to("cuda:0")
    before, keep = layer.weight.detach().cpu(), torch.rand(6, 12) < 0.5
    optimizer = make(layer.parameters(), lr=0.1, keep={layer.weight: keep}, compact=compact)

    def step(x):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    run = capture_step(step, torch.randn(4, 12).to("cuda:0"), restore=(layer, optimizer))
    assert torch.equal(layer.weight.cpu(), before)
    for _ in range(2):
        run(torch.randn(4, 12).to("cuda:0"))
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    changed = layer.weight.detach().cpu() != before
    assert not changed[keep].any()
    assert changed[~keep].all()


def test_a_warm_up_step_that_raises_is_waited_for_before_anything_is_put_back(gpu):
    layer = nn.Linear(3, 3).to("cuda:0")
    before = layer.weight.detach().cpu()

    def step(x):
        with torch.no_grad():
            layer.weight.add_(1)
        raise KeyError("a step's own error")

    with pytest.raises(KeyError):
        capture_step(step, torch.ones(1, 3, device="cuda:0"), restore=[layer])
    side = next(entry[1] for entry in gpu.log if entry[0] == "wait_stream")
    assert ("wait_stream", gpu.defaults[0], side) in gpu.log
    assert torch.equal(layer.weight.cpu(), before)  # a Race, were it not waited for


def test_a_step_that_waits_is_named_and_leaves_everything_as_it_was(gpu):
    masked = masked_network()
    with pytest.raises(CaptureError, match=r"\.item\(\)"):
        capture_step(lambda x: masked(x).sum().item(), batches(1)[0], restore=[masked])
    assert masked.rng_state.tolist() == [3, 0]
    assert torch.cuda.get_sync_debug_mode() == 0


def structure_of_its_own(calls):
    """A step that draws over another structure once it is captured."""
    state, tau = torch.tensor([5, 2], device="cuda:0"), torch.tensor(1.0, device="cuda:0")

    def step(x, y):
        calls.append(torch.cuda.is_current_stream_capturing())
        logits = torch.ones(3, 4 + calls[-1], device="cuda:0")
        dwm.ops.sample([logits], [logits], state, tau, mode=Mode.KEEP)
        return x.sum()

    return step


def test_what_only_a_capture_refuses_is_a_capture_error(gpu):
    with pytest.raises(CaptureError, match="run the step once before the capture"):
        capture_step(structure_of_its_own([]), *[torch.ones(2, device="cuda:0")] * 2)
    assert not torch.cuda.is_current_stream_capturing()


def test_a_study_goes_on_uncaptured_with_one_warning(gpu):
    calls = []
    training = FastStep(structure_of_its_own(calls), restore=())
    x = torch.ones(2, device="cuda:0")
    with pytest.warns(RuntimeWarning, match="without a CUDA graph") as seen:
        losses = [float(training(x, x).cpu()) for _ in range(3)]
    assert losses == [2, 2, 2]
    assert sum("without a CUDA graph" in str(w.message) for w in seen) == 1
    assert calls[-3:] == [False, False, False]


def test_an_input_error_of_the_step_itself_is_its_own(gpu):
    def step(x):
        raise InputError("no such batch")

    with pytest.raises(InputError, match="no such batch"):
        capture_step(step, torch.ones(1, device="cuda:0"))


def test_a_capture_that_fails_gives_torch_its_generator_and_memory_back_and_names_the_first_error(gpu):
    layer, runs = nn.Linear(3, 3).to("cuda:0"), []

    def step(x):
        runs.append(None)
        if len(runs) > 3:  # the warm-up is over
            raise RuntimeError("operation not permitted when stream is capturing")
        return layer(x)

    class Broken(torch.cuda.graph):
        def __exit__(self, *args):
            super().__exit__(*args)
            raise RuntimeError("operation failed due to a previous error during capture")

    generator = torch.cuda.default_generators[0]
    before, other = generator.state, torch.cuda.default_generators[1].state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "graph", Broken)
        try:
            raise KeyError("an error that is being handled already")
        except KeyError:
            with pytest.raises(CaptureError, match="operation not permitted"):
                capture_step(step, torch.ones(1, 3, device="cuda:0"))
    assert generator.state is not before
    assert torch.cuda.default_generators[1].state is other
    assert [entry for entry in gpu.log if "Pool" in str(entry[0])] == [
        ("_cuda_endAllocateToPool", 0, (0, 1)),
        ("_cuda_releasePool", 0, (0, 1)),
    ]


def test_the_warm_up_runs_on_the_stream_of_the_capture(gpu):
    masked = masked_network()
    optimizer = MaskAdam(masked, lr=0.05)
    capture_step(training(masked, optimizer), batches(1)[0], restore=(masked, optimizer))
    streams = {captured: {x.stream for x in gpu.launches if x.captured == captured} for captured in (False, True)}
    assert streams[True] == streams[False]
    assert len(streams[True]) == 1


def test_what_is_left_of_a_step_on_another_stream_is_named(gpu):
    runs = []

    def step(x):
        runs.append(None)
        if len(runs) > 3:  # the warm-up is over
            raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")
        return x * 2

    with pytest.raises(CaptureError, match=r"earlier steps.*detached"):
        capture_step(step, torch.ones(1, 3, device="cuda:0"))
