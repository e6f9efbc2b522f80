"""Streamed learning with moments and logits in few bits: exact to resume, small in memory, and as good."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.ops import coding
from dwm_fast.optim import MaskAdam, StreamedAdam, _moments

FORMATS = [("fp32", "8bit"), ("bf16", "8bit"), ("fixed16", "8bit"), ("fixed16", "bf16"), ("bf16", "fp32")]
EACH = pytest.mark.parametrize(("logits", "moments"), FORMATS)


def network(width=24):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 5))


def streamed(logits, moments, accumulate=1, **options):
    kind = dwm.GumbelSigmoid(tau=dwm.TauSchedule(2.0, 0.5, 8), init=1.0)
    model = dwm.mask_model(network(), kind, seed=7, memory="streamed", logits=logits).train()
    options = {"lr": 0.02, "coefficient": 3.0, "weight_decay": 0.01, **options}
    return model, StreamedAdam(model, accumulate=accumulate, moments=moments, **options)


def loss_of(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(6, 2, 4, 4, generator=generator), torch.randint(5, (6,), generator=generator)
    return F.cross_entropy(model(x), y)


def run(model, optimizer, steps, accumulate=1):
    for step in steps:
        for part in range(accumulate):
            loss_of(model, accumulate * step + part).backward()
        optimizer.step()


def state_of(model, optimizer):
    found = [p.detach().clone() for p in model.mask_parameters()]
    names = optimizer.state_names({})
    return found + [optimizer.state[p][name].clone() for p in model.mask_parameters() for name in names]


def all_equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@EACH
def test_what_is_stored_has_the_dtypes_that_were_asked_for(logits, moments):
    model, optimizer = streamed(logits, moments)
    run(model, optimizer, range(2))
    for p in model.mask_parameters():
        assert p.dtype == coding.LOGITS[logits]
        assert (optimizer.state[p]["exp_avg"].dtype, optimizer.state[p]["exp_avg_sq"].dtype) == coding.MOMENTS[moments]
        assert ("exp_avg_scale" in optimizer.state[p]) == (moments == "8bit")


@EACH
@pytest.mark.parametrize("accumulate", [1, 2])
def test_five_steps_saved_loaded_and_five_more_are_ten_to_the_last_bit(logits, moments, accumulate, tmp_path):
    whole, optimizer = streamed(logits, moments, accumulate)
    run(whole, optimizer, range(10), accumulate)
    first, other = streamed(logits, moments, accumulate)
    run(first, other, range(5), accumulate)
    dwm.save_masked(first, tmp_path / "run.safetensors")
    torch.save(other.state_dict(), tmp_path / "opt.pt")
    second = dwm.load_masked(network(), tmp_path / "run.safetensors").train()
    assert (second.memory, second.logits) == ("streamed", logits)
    another = StreamedAdam(second, accumulate=accumulate, moments=moments)
    another.load_state_dict(torch.load(tmp_path / "opt.pt"))
    run(second, another, range(5, 10), accumulate)
    assert all_equal(state_of(whole, optimizer), state_of(second, another))


@EACH
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_two_runs_are_one_and_another_seed_is_another(logits, moments, backend):
    with dwm.use_backend(backend):
        found = []
        for seed in (0, 0, 1):
            model, optimizer = streamed(logits, moments)
            model.rng_state[0] += seed
            run(model, optimizer, range(3))
            found.append(state_of(model, optimizer))
    assert all_equal(*found[:2])
    assert not all_equal(*found[1:])


@EACH
def test_ten_steps_stay_near_those_in_fp32(logits, moments):
    """Losses of ten steps; masks differ where a logit's rounding crosses a draw, so near and not equal."""
    exact, plain = streamed("fp32", "fp32")
    coded, optimizer = streamed(logits, moments)
    for step in range(10):
        for model, o in ((exact, plain), (coded, optimizer)):
            loss_of(model, step).backward()
            o.step()
    for a, b in zip(exact.mask_parameters(), coded.mask_parameters(), strict=True):
        moved, off = a - 1.0, coding.decoded(b) - a
        assert off.norm() < 0.5 * moved.norm()
        assert not torch.equal(a, coding.decoded(b))


@pytest.mark.parametrize("kind", [dwm.Threshold(), dwm.Threshold(ternary=True), dwm.Edit()], ids=repr)
def test_moments_in_8_bits_learn_any_kind_that_is_streamed(kind):
    logits = []
    for moments in ("fp32", "8bit"):
        model = dwm.mask_model(network(), kind, seed=7, memory="streamed").train()
        optimizer = StreamedAdam(model, lr=1e-3, coefficient=3.0, moments=moments)
        start = [p.clone() for p in model.mask_parameters()]
        run(model, optimizer, range(5))
        logits.append(list(model.mask_parameters()))
    for before, exact, coded in zip(start, *logits, strict=True):
        assert (coded - exact).norm() < 0.5 * (exact - before).norm()
        assert not torch.equal(coded, exact)


class Alive(TorchDispatchMode):
    """The most bytes that tensors took at once, those of `given` from the start."""

    def __init__(self, given):
        super().__init__()
        self.refs, self.peak = {}, 0
        self.note(given)

    def note(self, tensors):
        for storage in (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)):
            self.refs[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.refs = {key: (ref, size) for key, (ref, size) in self.refs.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.refs.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.note(tree_leaves(out))
        return out


def peak_of(layers, width, logits, moments):
    network = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).bfloat16()
    model = dwm.mask_model(network, dwm.GumbelSigmoid(), seed=0, memory="streamed", logits=logits).train()
    optimizer = StreamedAdam(model, moments=moments, coefficient=1.0)
    with Alive([*model.parameters(), *model.buffers()]) as alive:
        for _ in range(2):
            model(torch.ones(1, width, dtype=torch.bfloat16)).float().square().sum().backward()
            optimizer.step()
    return alive.peak


@pytest.mark.parametrize(
    ("logits", "moments", "most"), [("fp32", "fp32", 14.1), ("fp32", "8bit", 8.1), ("fixed16", "8bit", 6.1)]
)
def test_bytes_a_masked_weight_at_the_peak_of_a_run_its_bf16_weight_included(logits, moments, most):
    """What one more layer adds to the peak: a layer's gradient and masked weight are there for one layer at a time."""
    width, few, many = 384, 3, 9
    found = [peak_of(layers, width, logits, moments) for layers in (few, many)]
    bytes_a_weight = (found[1] - found[0]) / ((many - few) * width**2)
    assert most - 0.1 <= bytes_a_weight <= most


def test_the_page_s_table_of_llama_is_what_its_tensors_would_take():
    page = (Path(__file__).parents[2] / "docs" / "streamed.md").read_text(encoding="utf-8")
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    masked = 32 * sum(rows * columns for rows, columns in shapes)
    whole = masked + 2 * 128256 * 4096 + (2 * 32 + 1) * 4096  # embedding and head, norms
    assert f"({masked:,} of {whole:,} weights)" in page
    for logits, moments in (("fp32", "fp32"), ("fp32", "8bit"), ("fixed16", "8bit")):
        like = [torch.empty(shape, dtype=coding.LOGITS[logits], device="meta") for shape in shapes]
        state = [_moments.new_state(x, moments, name) for x in like for name in _moments.state_names(moments)]
        parts = [2 * whole, *(32 * sum(t.nbytes for t in role) for role in (like, state))]
        cells = " | ".join(f"{part / 1e9:.1f}" for part in (*parts, sum(parts)))
        assert f"| {logits}, {moments} | {cells} |" in page


@EACH
def test_masks_are_read_merged_packed_and_served_from_any_format(logits, moments):
    model, optimizer = streamed(logits, moments)
    run(model, optimizer, range(6))
    plain = dwm.mask_model(network(), model.kind, seed=7)
    plain.load_state_dict(model.state_dict())
    for a, b in zip(plain.mask_parameters(), model.mask_parameters(), strict=True):
        assert torch.equal(a, coding.decoded(b))
    x = torch.randn(3, 2, 4, 4)
    out = model.eval()(x)
    assert torch.equal(out, plain.eval()(x))
    assert torch.equal(dwm.merge(model)(x), out)
    assert torch.equal(dwm.pack(model)(x), dwm.pack(plain)(x))
    assert model.fraction_kept() == plain.fraction_kept()
    assert torch.equal(model.sparsity_penalty(), plain.sparsity_penalty())
    bank = dwm.MaskBank(network())
    bank.add("one", model)
    bank.activate("one")
    assert torch.equal(bank(x), out)


def test_fp32_logits_are_loaded_into_16_bits_by_value():
    plain = dwm.mask_model(network(), dwm.GumbelSigmoid(init=-1.25), seed=7)
    for logits in ("bf16", "fixed16"):
        model, _ = streamed(logits, "8bit")
        model.load_state_dict(plain.state_dict())
        assert all((coding.decoded(p) == -1.25).all() for p in model.mask_parameters())


def test_a_layer_starts_anew_in_its_own_format():
    model, optimizer = streamed("fixed16", "8bit")
    run(model, optimizer, range(2))
    model.model[3].reset_mask()
    assert (coding.decoded(model.model[3].mask_logits) == 1.0).all()


def test_half_precision_and_memory_formats_leave_the_logits_format_alone():
    model, optimizer = streamed("fixed16", "8bit")
    model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    assert all(p.dtype == torch.int16 for p in model.mask_parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, 0)
    loss.backward()
    optimizer.step()
    assert not all((coding.decoded(p) == 1.0).all() for p in model.mask_parameters())


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_moments_go_from_format_to_format_by_value(moments):
    kind = dwm.GumbelSigmoid(init=1.0)
    plain = dwm.mask_model(network(), kind, seed=7).train()
    folded = MaskAdam(plain, lr=0.02)
    for step in range(2):
        folded.zero_grad()
        loss_of(plain, step).backward()
        folded.step()
    _, coded = streamed("fp32", moments)
    coded.load_state_dict(folded.state_dict())
    again, exact = streamed("fp32", "fp32")
    exact.load_state_dict(coded.state_dict())
    for a, b in zip(plain.mask_parameters(), again.mask_parameters(), strict=True):
        for name, power in (("exp_avg", 2), ("exp_avg_sq", 4)):
            old, new = folded.state[a][name], exact.state[b][name]
            levels = 127 if name == "exp_avg" else 255
            # nearest code of the root, so half a step of the grid's widest place off, or half an ulp of bf16
            budget = power * old.abs().max() / levels if moments == "8bit" else 2.0**-8 * old.abs()
            assert ((old - new).abs() <= budget).all()
            assert not torch.equal(new, torch.zeros_like(new))


def test_moments_in_8_bits_are_refused_by_whoever_does_not_know_them():
    model, optimizer = streamed("fp32", "8bit")
    run(model, optimizer, range(1))
    plain = MaskAdam(dwm.mask_model(network(), dwm.GumbelSigmoid(), seed=7))
    with pytest.raises(InputError, match="another format"):
        plain.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_layers_that_the_loss_does_not_reach_feel_penalty_and_decay_alone(accumulate):
    model, optimizer = streamed("fixed16", "8bit", accumulate)
    model.model[0].forward = lambda x: x.repeat(1, 2, 1, 1)  # the convolution is passed by
    before = coding.decoded(model.model[0].mask_logits)
    loss_of(model, 0).backward()
    optimizer.step()
    assert (coding.decoded(model.model[0].mask_logits) < before).all()


def test_clipping_is_refused_with_logits_of_whole_numbers_too():
    model, _ = streamed("fixed16", "8bit")
    loss_of(model, 0).backward()
    with pytest.raises(InputError, match="lower lr"):
        nn.utils.clip_grad_norm_(model.mask_parameters(), 1.0)
    copy.deepcopy(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "streamed", "logits": "int8"}, "'fixed16'"),
        ({"logits": "bf16"}, "memory='streamed'"),
        ({"memory": "streamed", "logits": "bf16", "kind": dwm.Threshold()}, "GumbelSigmoid"),
        ({"memory": "streamed", "logits": "fixed16", "kind": dwm.Edit()}, "GumbelSigmoid"),
        ({"memory": "streamed", "logits": "bf16", "kind": dwm.GumbelSigmoid(kappa=2.0, hard=False)}, "memory='plain'"),
        ({"memory": "streamed", "logits": "bf16", "kind": dwm.SemiStructured(2, 4)}, "memory='plain'"),
    ],
)
def test_formats_that_cannot_be_are_refused(options, words):
    kind = options.pop("kind", dwm.GumbelSigmoid())
    with pytest.raises(InputError, match=words):
        dwm.mask_model(network(), kind, **options)
    with pytest.raises(InputError, match="'8bit'"):
        StreamedAdam(streamed("fp32", "fp32")[0], moments="4bit")


def test_masks_of_bf16_logits_are_as_good_as_fp32_s_when_rounded_at_random_and_stay_where_they_are_to_nearest(
    monkeypatch,
):
    """A layer whose outputs are those of a half-kept one; steps of 3.5e-3 are below half a unit of bf16 near 2."""

    def loss_after(logits, steps=950):
        torch.manual_seed(0)
        layer = nn.Linear(16, 16, bias=False)
        wanted = layer.weight.detach() * (torch.rand(16, 16) < 0.5)
        x = torch.randn(64, 16)
        model = dwm.mask_model(layer, dwm.GumbelSigmoid(init=2.0), memory="streamed", logits=logits, seed=1).train()
        optimizer = StreamedAdam(model, lr=3.5e-3)
        for _ in range(steps):
            nn.functional.mse_loss(model(x), x @ wanted.T).backward()
            optimizer.step()
        return nn.functional.mse_loss(model.eval()(x), x @ wanted.T).item()

    start, exact, at_random = loss_after("bf16", 0), loss_after("fp32"), loss_after("bf16")
    with dwm.use_backend("reference"):
        step = sys.modules["dwm_fast.ops.coded_adam"]
        monkeypatch.setattr(step, "encoded", lambda values, dtype, words: coding.encoded(values, dtype))
        nearest = loss_after("bf16", 200)  # each of them rounds back to where it began
    assert exact < start / 2
    assert at_random < start / 2
    assert nearest == start
