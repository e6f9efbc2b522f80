"""Mask kinds: their rules, start values, schedules, and the way to plain data and back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import dwm_fast as dwm
from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.nn import kind_from_dict
from dwm_fast.ops import Mode

pytestmark = pytest.mark.usefixtures("reference")

KINDS = [
    dwm.GumbelSigmoid(),
    dwm.GumbelSigmoid(tau=0.5, init=-1.0, hard=False),
    dwm.GumbelSigmoid(tau=dwm.TauSchedule(2.0, 0.5, 100)),
    dwm.Threshold(),
    dwm.Threshold(threshold=0.25, init=0.5, ternary=True),
    dwm.Edit(),
    dwm.Edit(threshold=2.0, init=0.1),
]
MORE_KINDS = [
    dwm.Edit(spread=0.5),
    dwm.KernelSoft(),
    dwm.KernelSoft(threshold=0.1, init=0.2, noisy=True),
    dwm.Threshold(scheme="uniform"),
    dwm.GumbelSigmoid(tau=dwm.LinearSchedule(4.0, 0.05, 9), kappa=dwm.TauSchedule(25.0, 350.0, 9), hard=False),
    dwm.SemiStructured(4, 8, kappa=dwm.LinearSchedule(100.0, 500.0, 7), hard=True),
]


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_keep_is_what_the_deterministic_operation_packs(kind):
    border = kind.threshold if isinstance(kind, dwm.Threshold) else 1.0
    values = [-2.0, -border, -1e-30, -0.0, 0.0, 1e-30, border, 2.0]
    logits = torch.tensor([*values, math.nextafter(border, 9), math.nextafter(border, 0)])
    weight = torch.linspace(-1, 1, len(logits))
    _, bits, _ = ops.sample(
        [logits],
        [weight],
        torch.zeros(2, dtype=torch.int64),
        torch.tensor(1.0),
        mode=kind.eval_mode,
        thresholds=[kind.unit(weight)],
        pack=True,
    )
    assert torch.equal(kind.keep(logits), ops.unpack(bits, [len(logits)])[0])


def test_a_logit_of_zero_is_kept():
    zero = torch.zeros(3)
    assert dwm.GumbelSigmoid().keep(zero).all()
    assert not dwm.Threshold(threshold=0.0).keep(zero).any()
    assert dwm.Edit().keep(torch.tensor([1.0, -1.0])).all()
    assert dwm.KernelSoft().keep(torch.tensor([5e-3, 4.99e-3])).tolist() == [True, False]


def test_kernel_soft_starts_with_one_number_a_kernel():
    for shape, expected in (((4, 3, 5, 5), (4, 3, 1, 1)), ((4, 3), (4, 3)), ((0, 3, 1, 1), (0, 3, 1, 1))):
        start = dwm.KernelSoft(init=0.25).initial(torch.zeros(shape, dtype=torch.bfloat16))
        assert (start.dtype, tuple(start.shape)) == (torch.float32, expected)
        assert (start == 0.25).all()


@pytest.mark.parametrize(
    ("kind", "training", "evaluation"),
    [
        (dwm.GumbelSigmoid(), Mode.GUMBEL_HARD, Mode.KEEP),
        (dwm.GumbelSigmoid(hard=False), Mode.GUMBEL_SOFT, Mode.KEEP),
        (dwm.Threshold(), Mode.THRESHOLD, Mode.THRESHOLD),
        (dwm.Threshold(ternary=True), Mode.TERNARY, Mode.TERNARY),
        (dwm.Edit(), Mode.EDIT, Mode.EDIT),
    ],
    ids=repr,
)
def test_each_kind_names_its_rules(kind, training, evaluation):
    assert kind.training_mode == training
    assert kind.eval_mode == evaluation


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_start_values_are_fp32_with_the_strides_of_the_weight(kind):
    weight = torch.randn(4, 3, 2, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    start = kind.initial(weight)
    assert start.dtype == torch.float32
    assert start.stride() == weight.stride()
    assert (start == torch.tensor(kind.init)).all()


def test_the_published_constants_are_the_defaults():
    assert (dwm.GumbelSigmoid().tau, dwm.GumbelSigmoid().init) == (1.0, 2.0)
    assert (dwm.Threshold().threshold, dwm.Threshold().init) == (5e-3, 1e-2)


def test_the_unit_of_an_edit_is_a_number_of_standard_deviations():
    weight = torch.tensor([1.0, 3.0, 5.0, 7.0])
    assert dwm.Edit(threshold=0.5).unit(weight) == pytest.approx(0.5 * math.sqrt(5))
    assert dwm.Edit().unit(torch.zeros(0)) == 0
    assert dwm.Edit().unit(torch.ones(1)) == 0
    assert math.isnan(dwm.Edit().unit(torch.ones(3, device="meta")))


def test_edits_start_with_the_asked_spread_and_both_signs():
    weight = torch.zeros(100, 100)
    torch.manual_seed(0)
    drawn = dwm.Edit(spread=0.1).initial(weight)
    # Of 10^4 normal draws the deviation is within 5 standard errors, 5 * 0.1 / sqrt(2 * 10^4), of 0.1.
    assert float(drawn.std()) == pytest.approx(0.1, abs=5 * 0.1 / math.sqrt(2e4))
    assert 4750 <= int((drawn > 0).sum()) <= 5250  # 5 standard errors of a fair coin's 5000
    assert not dwm.Edit().initial(weight).any()


def test_a_schedule_falls_geometrically_and_then_stays():
    schedule = dwm.TauSchedule(4.0, 1.0, 8)
    at = [float(schedule.at(torch.tensor(n))) for n in (0, 2, 4, 8, 9, 10**12)]
    assert at == pytest.approx([4.0, 4 / math.sqrt(2), 2.0, 1.0, 1.0, 1.0])
    assert schedule.at(torch.tensor(3)).dtype == torch.float32
    assert schedule.at(torch.tensor(3)).shape == ()
    rising = dwm.TauSchedule(0.5, 2.0, 2)
    assert float(rising.at(torch.tensor(1))) == pytest.approx(1.0)


def test_a_linear_schedule_goes_in_equal_parts_and_then_stays():
    schedule = dwm.LinearSchedule(4.0, 0.05, 2000)
    at = [float(schedule.at(torch.tensor(n))) for n in (0, 500, 1000, 2000, 9000)]
    assert at == pytest.approx([4.0, 3.0125, 2.025, 0.05, 0.05])
    assert schedule.at(torch.tensor(3)).dtype == torch.float32


def test_a_scale_is_drawn_beside_tau_and_wants_soft_masks():
    kind = dwm.GumbelSigmoid(tau=2.0, kappa=dwm.LinearSchedule(25.0, 350.0, 100), hard=False)
    assert kind.training_mode == ops.SCALED_SOFT
    assert kind.current_tau(torch.tensor(2.0), torch.tensor([1, 50])).tolist() == [2.0, 187.5]
    with pytest.raises(InputError, match="give hard=False"):
        dwm.GumbelSigmoid(kappa=2.0)


def test_a_start_from_a_mask_moves_logits_by_spreads_to_its_side():
    keep = torch.tensor([True, False])
    moved = dwm.GumbelSigmoid(init=0.0, spread=0.014, kappa=25.0, hard=False).lean(torch.zeros(2), keep, 3.0)
    assert moved.tolist() == pytest.approx([0.042, -0.042])
    with pytest.raises(InputError, match="no start from another mask"):
        dwm.Edit().lean(torch.zeros(2), keep, 3.0)


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS], ids=repr)
def test_kinds_survive_the_way_through_json(kind):
    assert kind_from_dict(json.loads(json.dumps(kind.to_dict()))) == kind
    assert hash(kind_from_dict(kind.to_dict())) == hash(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind.init = 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dwm.GumbelSigmoid(tau=0.0), "tau=0.0; expected a number above 0"),
        (lambda: dwm.GumbelSigmoid(tau=math.nan), "tau=nan"),
        (lambda: dwm.GumbelSigmoid(tau=1e-300), "tau=1e-300; expected a number above 0 .in fp32."),
        (lambda: dwm.GumbelSigmoid(tau=math.inf), "tau=inf"),
        (lambda: dwm.TauSchedule(0.0, 1.0, 5), "start=0.0"),
        (lambda: dwm.TauSchedule(1.0, -1.0, 5), "end=-1.0"),
        (lambda: dwm.TauSchedule(1.0, math.nan, 5), "end=nan"),
        (lambda: dwm.TauSchedule(1.0, 1.0, 0), "steps=0"),
        (lambda: dwm.Edit(threshold=0.0), "threshold=0.0"),
        (lambda: dwm.GumbelSigmoid(tau="1"), "tau='1'; expected a number above 0 .in fp32. or a TauSchedule"),
        (lambda: dwm.GumbelSigmoid(tau=True), "tau=True"),
        (lambda: dwm.GumbelSigmoid(init=math.nan), "init=nan; expected a finite number"),
        (lambda: dwm.Threshold(init=1e300), r"init=1e\+300; expected a finite number"),
        (lambda: dwm.Edit(init=-(10**400)), "init=-1000+; expected a finite number"),
        (lambda: dwm.GumbelSigmoid(init=torch.zeros(2)), "init=tensor.*expected a finite number"),
        (lambda: dwm.GumbelSigmoid(hard="no"), "hard='no'; expected True or False"),
        (lambda: dwm.TauSchedule("2", 1.0, 5), "start='2'"),
        (lambda: dwm.TauSchedule(2.0, 1.0, None), "steps=None"),
        (lambda: dwm.Threshold(threshold=math.nan), "threshold=nan"),
        (lambda: dwm.Threshold(init=-math.inf), "init=-inf"),
        (lambda: dwm.Threshold(ternary=1), "ternary=1; expected True or False"),
        (lambda: dwm.Threshold(scheme=None), "scheme=None; expected one of 1s"),
        (lambda: dwm.Edit(threshold="1"), "threshold='1'"),
        (lambda: dwm.Edit(init=math.inf), "init=inf"),
        (lambda: dwm.Edit(spread=None), "spread=None"),
        (lambda: dwm.KernelSoft(threshold=math.nan), "threshold=nan"),
        (lambda: dwm.KernelSoft(noisy="yes"), "noisy='yes'"),
        (lambda: kind_from_dict({"kind": "edit", "init": "0"}), "init='0'"),
        (lambda: kind_from_dict({"kind": "magic"}), "'magic' is unknown; expected one of gumbel-sigmoid"),
        (lambda: kind_from_dict({"kind": "edit", "speed": 3}), "'edit'.*speed"),
        (lambda: kind_from_dict({"kind": "gumbel-sigmoid", "tau": {"start": 1}}), "'gumbel-sigmoid'.*missing"),
        (lambda: kind_from_dict({}), "'None' is unknown"),
        (lambda: kind_from_dict(["edit"]), "expected the dictionary"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Squared(dwm.nn.MaskKind):
    """m = min(l * l, 1): none of the rules of `Mode`."""

    init: float = 0.5
    name = "squared"

    def draw(self, learned, weights, rng_state, tau, *, training, samples=1, sample=None, dtype=None, **options):
        masks = [
            (x * x).clamp(max=1) if training else (x * x >= 1).to(w.dtype)
            for x, w in zip(learned, weights, strict=True)
        ]
        masked = [m * w for m, w in zip(masks, weights, strict=True)]
        return masked, torch.empty(0, dtype=torch.uint8), torch.cat([m.flatten() for m in masks]).mean()

    def keep(self, logits):
        return logits * logits >= 1

    @property
    def start_value(self):
        return self.init


def test_a_kind_of_ones_own_is_learned_exported_and_read_back(monkeypatch, tmp_path):
    monkeypatch.setitem(dwm.nn.kinds.KINDS, "squared", Squared)
    del dwm.nn.kinds.KINDS["squared"]
    assert dwm.nn.register_kind(Squared) is Squared
    torch.manual_seed(0)
    net, x = torch.nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    masked = dwm.mask_model(torch.nn.Sequential(net), Squared())
    (logits,) = masked.mask_parameters()
    masked.train()(x).sum().backward()
    torch.testing.assert_close(logits.grad, 2 * 0.5 * net.weight.detach() * x.sum(0))  # d(l^2 w x)/dl
    with torch.no_grad():
        logits.copy_(torch.tensor([[1.0, -1.0, 0.9], [0.0, 2.0, -2.0]]))
    assert masked.keep_masks()["0"].tolist() == [[True, True, False], [False, True, True]]
    dwm.save_masked(masked, tmp_path / "m.safetensors")
    again = dwm.load_masked(torch.nn.Sequential(net), tmp_path / "m.safetensors")
    assert again.kind == Squared()
    assert torch.equal(again.eval()(x), masked.eval()(x))
    merged = dwm.merge(masked)
    torch.testing.assert_close(merged(x), masked.eval()(x))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (dict, "is no mask kind"),
        (Squared(), "is no mask kind"),
        (type("Plain", (dwm.nn.MaskKind,), {}), "Plain.name is None"),
        (dataclasses.dataclass(frozen=True)(type("Twin", (Squared,), {"name": "threshold"})), "choose another"),
    ],
)
def test_what_is_no_kind_is_not_registered(kind, message):
    with pytest.raises(InputError, match=message):
        dwm.nn.register_kind(kind)
