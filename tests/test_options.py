"""Options say by their annotations which values are right, and one check holds them to it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwm_fast._options import AREA, EPOCHS, RATE, above, at_least, check_options, whole
from dwm_fast.errors import InputError
from dwm_fast.methods import SPG, LearnedMask, TrainOptions
from dwm_fast.methods._real_masks import RealMaskOptions
from dwm_fast.pacs.config import StudyConfig

OPTIONS = [TrainOptions, LearnedMask, RealMaskOptions, SPG, StudyConfig]


@dataclass(frozen=True)
class Toy:
    """One field of each sort."""

    epochs: Annotated[int, EPOCHS] = 1
    lr: Annotated[float, RATE] = 0.1
    area: Annotated[float, AREA] = 1.0
    budget: Annotated[float | None, above(0, "a rise", ", in nats")] = None
    decay: Annotated[float, at_least(0)] = 0.0
    samples: Annotated[int, whole(1)] = 1
    way: Literal["fast", "slow"] = "fast"
    free: float = 0.0

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"epochs": -1}, "epochs is -1; expected a whole number of at least 0"),
        ({"epochs": 1.5}, "epochs is 1.5; expected a whole number of at least 0"),
        ({"lr": 0.0}, "lr is 0.0; expected a rate above 0"),
        ({"area": 1.1}, "area is 1.1; expected a fraction of the area above 0 and up to 1"),
        ({"budget": -2.0}, "budget is -2.0; expected a rise above 0, in nats"),
        ({"decay": -0.1}, "decay is -0.1; expected a number of at least 0"),
        ({"samples": 0}, "samples is 0; expected a whole number of at least 1"),
        ({"way": "quick"}, "way is 'quick'; expected one of fast, slow"),
        ({"lr": -1.0, "area": 7.0}, "lr is -1.0; expected a rate above 0"),
    ],
)
def test_what_breaks_a_rule_is_named_with_what_was_expected(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Toy(**given_)
    assert str(caught.value) == message


@given(st.floats())
def test_a_rate_is_right_exactly_where_it_is_finite_and_above_zero(rate: float) -> None:
    if math.isfinite(rate) and rate > 0:
        assert Toy(lr=rate).lr == rate
    else:
        with pytest.raises(InputError, match=r"lr is .*expected a rate above 0"):
            Toy(lr=rate)


def test_none_is_right_where_the_type_allows_it_and_a_field_without_a_rule_is_free() -> None:
    assert Toy(budget=None).budget is None
    assert math.isinf(Toy(free=math.inf).free)


@pytest.mark.parametrize("kind", OPTIONS)
def test_no_option_of_a_method_or_study_may_be_infinite_or_an_unknown_word(kind: Any) -> None:
    checked = 0
    for name, hint in get_type_hints(kind, include_extras=True).items():
        numbers = get_origin(hint) is Annotated and ({float, int} & {get_args(hint)[0], *get_args(get_args(hint)[0])})
        for wrong in (math.inf, -math.inf, math.nan) if numbers else ("magic",) if get_origin(hint) is Literal else ():
            with pytest.raises(InputError, match=name):
                dataclasses.replace(kind(), **{name: wrong})
            checked += 1
    assert checked >= 12


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_number_among_the_options_has_a_rule(kind: Any) -> None:
    hints = get_type_hints(kind, include_extras=True)
    assert [name for name, hint in hints.items() if hint in (int, float) or hint in (int | None, float | None)] == []
