"""What only a device can show: graphs that draw new masks, no synchronisation, tables safe on every stream."""

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.kernels import _pointers, _tables
from dwm_fast.kernels.sample import sample, sample_backward
from dwm_fast.kernels.update import mask_adam
from dwm_fast.ops.draw import Draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SHAPES = [(64, 3, 7, 7), (64, 64, 3, 3), (128, 64, 1, 1), (100, 512), (1000,), (7,)]


class Step:
    """A mask-training step without a network: sample, made-up gradients, chain rule, Adam; noise moves on."""

    def __init__(self, shapes=SHAPES):
        generator = torch.Generator().manual_seed(1)
        last = {"memory_format": torch.channels_last}
        draw = [torch.randn(s, generator=generator).cuda() for s in shapes]
        self.weights = [w.contiguous(**last) if w.dim() == 4 else w for w in draw]
        self.logits = [torch.zeros_like(w) for w in self.weights]
        self.moments = [[torch.zeros_like(w) for w in self.weights] for _ in range(2)]
        self.rng = torch.tensor([42, 0], device="cuda")
        self.tau = torch.tensor(1.0, device="cuda")
        self.scale = torch.tensor(1e-3, device="cuda")
        self.steps = torch.zeros(len(shapes), device="cuda")
        self.lr = torch.tensor(1e-2, dtype=torch.float64, device="cuda")
        self.layers, self.thresholds = list(range(len(shapes))), [0.0] * len(shapes)

    def __call__(self):
        draw = Draw(self.rng, self.tau, self.layers, self.thresholds, 0)
        masked, bits, penalty = sample(self.logits, self.weights, draw, torch.bfloat16, True)
        grads = [m.float().sin().to(m.dtype) for m in masked]
        dlogits, _ = sample_backward(grads, penalty, self.logits, self.weights, draw, True, True)
        mask_adam(
            self.logits,
            self.weights,
            grads,
            *self.moments,
            draw,
            self.scale,
            self.steps,
            self.lr,
            0.9,
            0.99,
            1e-15,
            0.0,
            True,
        )
        self.rng[1:].add_(1)
        self.steps.add_(1)
        return bits, dlogits, masked

    def restart(self):
        for tensor in (*self.logits, *self.moments[0], *self.moments[1]):
            tensor.zero_()
        self.rng.copy_(torch.tensor([42, 0]))
        self.steps.fill_(1)


def captured(step):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


def test_replays_draw_new_masks_and_agree_with_eager():
    step = Step()
    graph, (bits, dlogits, masked) = captured(step)
    step.restart()
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append([bits.clone(), *(x.clone() for x in (*dlogits, *masked, *step.logits))])
    assert not torch.equal(replayed[0][0], replayed[1][0])
    step.restart()
    for expected in replayed:
        eager_bits, eager_dlogits, eager_masked = step()
        actual = [eager_bits, *eager_dlogits, *eager_masked, *step.logits]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_graph_outlives_the_caches():
    step = Step()
    graph, (bits, _, _) = captured(step)
    step.restart()
    graph.replay()
    first = bits.clone()
    _tables._plans.clear()
    _pointers._entries.clear()
    torch.cuda.empty_cache()
    filler = [torch.full((1 << 20,), 255, dtype=torch.uint8, device="cuda") for _ in range(64)]
    step.restart()
    graph.replay()
    assert torch.equal(bits, first)
    assert len(filler) == 64


def test_nothing_waits_for_the_device():
    step = Step()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_capture_without_warm_up_says_so():
    step = Step([(33, 5), (12, 8, 3, 3)])
    with pytest.raises(InputError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()


def test_streams_share_tables():
    step = Step()
    step.rng[1:].zero_()
    draw = Draw(step.rng, step.tau, step.layers, step.thresholds, 0)
    expected = sample(step.logits, step.weights, draw, None, True)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            actual = sample(step.logits, step.weights, draw, None, True)
        torch.cuda.synchronize()
        assert torch.equal(actual[1], expected[1])


def test_repeats_are_bitwise_equal():
    results = []
    for _ in range(3):
        step = Step()
        step.restart()
        for _ in range(5):
            bits, dlogits, masked = step()
        results.append([bits, *dlogits, *masked, *step.logits])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
