"""Streamed learning takes MaskAdam's steps bit for bit, saves no weight-sized tensor, and refuses what it cannot do."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dwm_fast as dwm
from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.optim import MaskAdam, StreamedAdam

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])
CHECKPOINTS = ("none", "not reentrant", "reentrant")


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(F.silu(self.up(x)))


class Tiny(nn.Module):
    """Two transformer blocks, the second used twice, then a small convolution."""

    def __init__(self, d=16):
        super().__init__()
        self.embed = nn.Embedding(32, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.conv = nn.Conv2d(1, 2, 3, padding="same", padding_mode="circular")
        self.thin = nn.Conv2d(2, 2, 3, stride=2, groups=2)
        self.head = nn.Linear(d, 32)
        self.unused = nn.Linear(d, d)
        self.kind = "none"

    def run(self, block, x):
        if self.kind == "none" or not self.training:
            return block(x)
        return checkpoint(block, x, use_reentrant=self.kind == "reentrant")

    def forward(self, ids):
        x = self.embed(ids)
        if self.kind == "reentrant" and not x.requires_grad:
            x.requires_grad_()
        for block in (*self.blocks, self.blocks[1]):
            x = self.run(block, x)
        maps = self.thin(self.conv(x[:, None])).mean((1, 2, 3))
        return self.head(x) * (1 + maps[:, None, None])


def network():
    torch.manual_seed(0)
    return Tiny()


def batch(step, rows=3):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, 32, (rows, 8), generator=generator), torch.randint(0, 32, (rows, 8), generator=generator)


def loss_of(model, step):
    ids, labels = batch(step)
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def pair(kind=None, checkpointed="none", accumulate=1, **options):
    kind = kind or dwm.GumbelSigmoid(tau=dwm.TauSchedule(2.0, 0.5, 8), init=1.0)
    options = {"lr": 0.02, "coefficient": 3.0, "weight_decay": 0.01, **options}
    base = network()
    plain = dwm.mask_model(base, kind, exclude="head", seed=7).train()
    streamed = dwm.mask_model(base, kind, exclude="head", seed=7, memory="streamed").train()
    streamed.model.kind = checkpointed
    return plain, MaskAdam(plain, **options), streamed, StreamedAdam(streamed, accumulate=accumulate, **options)


def state_of(model, optimizer):
    found = [p.detach().clone() for p in model.mask_parameters()]
    return found + [
        optimizer.state[p][name].clone() for p in model.mask_parameters() for name in optimizer.state_names({})
    ]


def all_equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@BACKENDS
@pytest.mark.parametrize("checkpointed", CHECKPOINTS)
def test_ten_steps_are_those_of_mask_adam_bit_for_bit(backend, checkpointed):
    with dwm.use_backend(backend):
        plain, folded, streamed, opt = pair(checkpointed=checkpointed)
        scheduler = [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in (folded, opt)]
        for step in range(10):
            losses = [loss_of(m, step) for m in (plain, streamed)]
            folded.zero_grad(), opt.zero_grad()
            for loss, o, s in zip(losses, (folded, opt), scheduler, strict=True):
                loss.backward(), o.step(), s.step()
            assert torch.equal(*losses)
            assert all_equal(state_of(plain, folded), state_of(streamed, opt)), step


@BACKENDS
@pytest.mark.parametrize("checkpointed", CHECKPOINTS)
def test_accumulated_passes_make_the_step_that_mask_adam_makes_of_them(backend, checkpointed):
    with dwm.use_backend(backend):
        plain, folded, streamed, opt = pair(checkpointed=checkpointed, accumulate=3)
        for step in range(3):
            folded.zero_grad()
            for part in range(3):
                for m in (plain, streamed):
                    (loss_of(m, 3 * step + part) / 3).backward()
            folded.step(), opt.step()
            assert all_equal(state_of(plain, folded), state_of(streamed, opt)), step


def test_several_passes_may_share_one_backward():
    plain, folded, streamed, opt = pair(accumulate=2)
    for step in range(2):
        folded.zero_grad()
        for m, o in ((plain, folded), (streamed, opt)):
            (loss_of(m, step) + loss_of(m, step + 10)).backward()
            o.step()
    assert all_equal(state_of(plain, folded), state_of(streamed, opt))


def test_an_incomplete_accumulation_is_stepped_by_step():
    streamed, opt = pair(accumulate=3)[2:]
    expected, other = pair(accumulate=2)[2:]
    for m, o in ((streamed, opt), (expected, other)):
        for part in range(2):
            loss_of(m, part).backward()
        o.step()
    assert all_equal(state_of(streamed, opt), state_of(expected, other))


@pytest.mark.parametrize(
    "kind",
    [
        dwm.GumbelSigmoid(hard=False, init=0.5),
        dwm.Threshold(init=6e-3),
        dwm.Threshold(ternary=True),
        dwm.Edit(spread=0.1),
    ],
    ids=lambda kind: type(kind).__name__,
)
def test_every_kind_that_sample_draws_learns_as_it_does_with_mask_adam(kind):
    torch.manual_seed(1)  # Edit spreads its start values by torch's generator
    plain, folded, streamed, opt = pair(kind)
    streamed.load_state_dict(plain.state_dict())
    for step in range(3):
        folded.zero_grad()
        for m, o in ((plain, folded), (streamed, opt)):
            loss_of(m, step).backward()
            o.step()
    assert all_equal(state_of(plain, folded), state_of(streamed, opt))


@pytest.mark.parametrize("checkpointed", CHECKPOINTS)
def test_forward_recompute_and_step_see_one_mask(checkpointed, monkeypatch):
    streamed, opt = pair(checkpointed=checkpointed)[2:]
    streamed.model.embed.requires_grad_()  # so that every layer has an input gradient to form
    drawn, stepped = {}, {}
    masked, step_layer = dwm.nn.streamed.Pass.masked, StreamedAdam._step_layer

    def watched(run, layer, dtype):
        found = masked(run, layer, dtype)
        drawn.setdefault(layer, []).append(found != 0)
        return found

    def stepping(self, layer, grad, run):
        again = ops.sample(
            [layer.mask_logits],
            [layer.frozen_weight],
            run.state,
            run.tau,
            layers=[layer.layer_index],
        )[0][0]
        stepped[layer] = again != 0
        step_layer(self, layer, grad, run)

    monkeypatch.setattr(dwm.nn.streamed.Pass, "masked", watched)
    monkeypatch.setattr(StreamedAdam, "_step_layer", stepping)
    loss_of(streamed, 0).backward()
    used = [layer for name, layer in streamed.mask_layers().items() if name != "unused"]
    for layer in used:
        uses = 2 if layer in set(streamed.model.blocks[1].modules()) else 1
        repeats = 2 + (checkpointed != "none" and any(layer in set(b.modules()) for b in streamed.model.blocks))
        assert len(drawn[layer]) == uses * repeats
        assert all(torch.equal(mask, stepped[layer]) for mask in drawn[layer])
    opt.step()
    loss_of(streamed, 1)
    assert all(not torch.equal(drawn[layer][0], drawn[layer][-1]) for layer in used[:8])


class Saved:
    """Storages that autograd saves and that were not there before, by their sizes in bytes."""

    def __init__(self, module):
        self.known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self.sizes = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)


@pytest.mark.parametrize("memory", ["streamed", "plain"])
def test_no_tensor_of_a_weights_size_is_saved(memory):
    layers = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Unflatten(1, (6, 4, 4)), nn.Conv2d(6, 64, 3))
    masked = dwm.mask_model(layers, dwm.GumbelSigmoid(), memory=memory, seed=0).train()
    (StreamedAdam if memory == "streamed" else MaskAdam)(masked)
    saved = Saved(masked)
    with saved.hooks():
        loss = masked(torch.randn(1, 64)).sum()
    smallest = min(4 * layer.weight.numel() for layer in (layers[0], layers[3]))
    assert smallest == 4 * 64 * 54
    found = [size for size in saved.sizes.values() if size >= smallest]
    assert (found == []) == (memory == "streamed")
    loss.backward()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_five_steps_saved_loaded_and_five_more_are_ten(accumulate, tmp_path):
    def run(m, o, steps):
        for step in steps:
            for part in range(accumulate):
                loss_of(m, accumulate * step + part).backward()
            o.step()

    whole, opt = pair(accumulate=accumulate)[2:]
    run(whole, opt, range(10))
    first, other = pair(accumulate=accumulate)[2:]
    run(first, other, range(5))
    dwm.save_masked(first, tmp_path / "run.safetensors")
    torch.save(other.state_dict(), tmp_path / "opt.pt")
    second = dwm.load_masked(network(), tmp_path / "run.safetensors").train()
    assert second.memory == "streamed"
    another = StreamedAdam(second, accumulate=accumulate)
    another.load_state_dict(torch.load(tmp_path / "opt.pt"))
    run(second, another, range(5, 10))
    assert all_equal(state_of(whole, opt), state_of(second, another))


def test_state_goes_between_mask_adam_and_streamed_adam():
    plain, folded, streamed, opt = pair()
    for step in range(2):
        folded.zero_grad()
        loss_of(plain, step).backward()
        folded.step()
    streamed.load_state_dict(plain.state_dict())
    opt.load_state_dict(folded.state_dict())
    folded.zero_grad()
    for m, o in ((plain, folded), (streamed, opt)):
        loss_of(m, 2).backward()
        o.step()
    assert all_equal(state_of(plain, folded), state_of(streamed, opt))


def test_a_layer_that_the_loss_does_not_reach_feels_the_penalty_alone():
    streamed, opt = pair()[2:]
    loss_of(streamed, 0).backward()
    before = streamed.model.unused.mask_logits.clone()
    opt.step()
    assert (streamed.model.unused.mask_logits < before).all()
    opt.step()  # no backward since: nothing to close
    assert opt.state_dict()["state"][0]["step"] == 1


def test_autocast_gives_what_mask_adam_gives_under_it():
    plain, folded, streamed, opt = pair()
    for step in range(3):
        folded.zero_grad()
        losses = []
        for m, o in ((plain, folded), (streamed, opt)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses.append(loss_of(m, step))
            losses[-1].backward()
            o.step()
        assert torch.equal(*losses)
        assert all_equal(state_of(plain, folded), state_of(streamed, opt))


def test_a_gradient_that_is_handed_out_steps_nothing():
    x = torch.randn(2, 16, requires_grad=True)
    layer = dwm.mask_model(nn.Linear(16, 4), dwm.GumbelSigmoid(), memory="streamed").train()
    StreamedAdam(layer)
    before = layer.model.mask_logits.clone()
    torch.autograd.grad(layer(x).sum(), x)
    layer(x).sum().backward(inputs=[x])
    assert torch.equal(layer.model.mask_logits, before)
    layer(x).sum().backward()
    assert not torch.equal(layer.model.mask_logits, before)


def test_eval_learns_nothing_and_gives_the_deterministic_masks_output():
    plain, _, streamed, _ = pair()
    with torch.no_grad():
        for a, b in zip(plain.mask_parameters(), streamed.mask_parameters(), strict=True):
            b.copy_(a.normal_())
    ids, _ = batch(0)
    before = [p.clone() for p in streamed.mask_parameters()]
    out = streamed.eval()(ids)
    assert torch.equal(out, plain.eval()(ids))
    out.sum().backward()
    assert all_equal(before, list(streamed.mask_parameters()))
    assert torch.equal(dwm.merge(streamed)(ids), out)
    assert torch.equal(dwm.pack(streamed)(ids), dwm.pack(plain)(ids))


REFUSED = {
    "clipping": lambda m, o: (loss_of(m, 0).backward(), nn.utils.clip_grad_norm_(m.mask_parameters(), 1.0)),
    "a second backward": lambda m, o: [loss_of(m, i).backward() for i in range(2)],
    "two passes, one backward": lambda m, o: (loss_of(m, 0) + loss_of(m, 1)).backward(),
    "the penalty in the loss": lambda m, o: (loss_of(m, 0) + m.sparsity_penalty()).backward(),
    "a weight that trains": lambda m, o: (m.model.conv.frozen_weight.requires_grad_(), loss_of(m, 0)),
    "a read weight": lambda m, o: (
        setattr(m.model.blocks[0], "forward", lambda x: x @ m.model.head.weight.t() @ m.model.blocks[0].q.weight),
        loss_of(m, 0),
    ),
    "logits changed between": lambda m, o: (lambda loss: (m.model.conv.mask_logits.add_(1), loss.backward()))(
        loss_of(m, 0)
    ),
    "state in the middle": lambda m, o: (loss_of(m, 0).backward(), o.state_dict()),
    "a copy": lambda m, o: copy.deepcopy(o),
    "MaskAdam": lambda m, o: MaskAdam(m),
    "no optimiser": lambda m, o: (m.attach_stepper(None), loss_of(m, 0)),
    "compile": lambda m, o: torch.compile(m, backend="eager", fullgraph=True)(batch(0)[0]),
}
WORDS = {
    "clipping": "clipped over the network.*lower lr",
    "a second backward": "accumulate=n",
    "two passes, one backward": "accumulate=n",
    "the penalty in the loss": "coefficient",
    "a weight that trains": "'conv'",
    "a read weight": "exclude=",
    "logits changed between": "changed between",
    "state in the middle": r"step\(\) first",
    "a copy": "load its state_dict",
    "MaskAdam": "StreamedAdam",
    "no optimiser": "StreamedAdam",
    "compile": "compile",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_with_the_way_out(what):
    streamed, opt = pair()[2:]
    with pytest.raises(Exception, match=WORDS[what]) as caught:
        REFUSED[what](streamed, opt)
    assert isinstance(caught.value, InputError) or what == "compile"


def test_a_grad_scaler_is_refused():
    streamed, opt = pair()[2:]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(streamed, 0)).backward()
    with pytest.raises(InputError, match="unscaled by a GradScaler"):
        scaler.step(opt)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (dwm.KernelSoft(), {}, "plain"),
        (dwm.GumbelSigmoid(), {"mask_samples": 2}, "accumulate"),
        (dwm.GumbelSigmoid(), {"memory": "small"}, "'streamed'"),
    ],
)
def test_masks_that_cannot_be_streamed_are_refused(kind, options, words):
    with pytest.raises(InputError, match=words):
        dwm.mask_model(network(), kind, **{"memory": "streamed", **options})


def test_streamed_adam_takes_streamed_models_alone():
    for given, words in ((pair()[0], "memory='plain'"), (network(), "Tiny")):
        with pytest.raises(InputError, match=words):
            StreamedAdam(given)
    with pytest.raises(InputError, match="accumulate"):
        StreamedAdam(pair()[2], accumulate=0)


@contextmanager
def processes(count):
    """torch.distributed as the first of `count` processes sees it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_several_processes_are_refused_whenever_they_meet():
    streamed = pair()[2]
    with processes(2), pytest.raises(InputError, match=r"in 2 processes.*memory='plain'"):
        StreamedAdam(streamed)
    StreamedAdam(streamed)
    before = [p.clone() for p in streamed.mask_parameters()]
    with processes(2), pytest.raises(InputError, match=r"in 2 processes.*memory='plain'"):
        loss_of(streamed, 0)
    with processes(1):
        loss_of(streamed, 0).backward()
    assert not all_equal(before, list(streamed.mask_parameters()))
