"""The drift block: corridors laid over the defaults field by field, and none that would halt before it warns."""

import math
from itertools import combinations

import pytest

from profiles.drift import LOGGED, SIGNALS, Corridor, Drift
from profiles.load import InvalidProfile, load

DEFAULTS = Drift().signals


def signals(**given) -> dict[str, Corridor | None]:
    return Drift.model_validate({"signals": given}).signals


def test_signals_by_default_are_the_defaults():
    assert {name: Corridor(**limits) for name, limits in SIGNALS.items()} == DEFAULTS


@pytest.mark.parametrize("name", SIGNALS)
def test_default_corridor_is_around_what_some_method_logs(name):
    assert any(name in logged for logged in LOGGED.values())


@pytest.mark.parametrize("name", SIGNALS)
def test_default_corridor_that_halts_also_warns_on_that_side(name):
    """By a level or by a ratio: nobody is surprised by a halt."""
    limits = SIGNALS[name]
    for halt in (limit for limit in limits if limit.startswith("halt_")):
        side = halt.rsplit("_", 1)[1]
        assert any(limit.startswith("warn_") and limit.endswith(side) for limit in limits), halt


def test_field_of_a_default_corridor_is_changed_and_its_others_stay():
    changed = signals(kl={"halt_max": 7.0})
    assert changed["kl"] == DEFAULTS["kl"].model_copy(update={"halt_max": 7.0})
    assert {name: corridor for name, corridor in changed.items() if name != "kl"} == {
        name: corridor for name, corridor in DEFAULTS.items() if name != "kl"
    }


def test_limit_of_a_default_corridor_is_taken_away_by_null():
    assert signals(kl={"warn_max": None})["kl"] == DEFAULTS["kl"].model_copy(update={"warn_max": None})


def test_corridor_is_taken_away_by_null_and_the_others_stay():
    changed = signals(kl=None)
    assert changed["kl"] is None
    assert changed | {"kl": DEFAULTS["kl"]} == DEFAULTS


def test_corridor_around_another_signal_stands_beside_the_defaults():
    changed = signals(reward={"halt_min": 0.1})
    assert changed == DEFAULTS | {"reward": Corridor(halt_min=0.1)}


def test_corridor_of_a_parent_profile_is_changed_by_its_child_field_by_field(smallest, write_profile):
    write_profile(smallest | {"drift": {"signals": {"kl": {"halt_max": 7.0}, "grad_norm": None}}}, "parent")
    own = {"signals": {"kl": {"patience": 9}, "grad_norm": {"warn_max": 1.0}}}
    child = load(write_profile({"extends": "parent", "drift": own}, "child")).drift.signals
    assert child["kl"] == DEFAULTS["kl"].model_copy(update={"halt_max": 7.0, "patience": 9})
    assert child["grad_norm"] == DEFAULTS["grad_norm"].model_copy(update={"warn_max": 1.0})


ORDERED = ("halt_min", "warn_min", "warn_max", "halt_max")
RATIOS = ("halt_ratio_min", "warn_ratio_min", "warn_ratio_max", "halt_ratio_max")
WRONG = [{low: 2.0, high: 1.0} for limits in (ORDERED, RATIOS) for low, high in combinations(limits, 2)]


@pytest.mark.parametrize("limits", WRONG, ids="-".join)
def test_corridor_that_would_halt_before_it_warns_is_refused_with_its_setting(limits, smallest, write_profile):
    """Each of the two, with all other limits taken away: the lower limit above the upper one."""
    none = dict.fromkeys((*ORDERED, *RATIOS))
    smallest["drift"] = {"signals": {"kl": none | limits}}
    with pytest.raises(InvalidProfile) as refused:
        load(write_profile(smallest))
    assert [name for name in ("drift.signals.kl", *limits) if name not in str(refused.value)] == []


def test_halt_set_below_the_default_warning_is_refused_with_both(smallest, write_profile):
    """A profile that moves one limit past another of the defaults learns of both values."""
    default = SIGNALS["kl"]["warn_max"]
    smallest["drift"] = {"signals": {"kl": {"halt_max": default / 2}}}
    with pytest.raises(InvalidProfile) as refused:
        load(write_profile(smallest))
    text = str(refused.value)
    assert "drift.signals.kl" in text and str(default) in text and str(default / 2) in text
    smallest["drift"]["signals"]["kl"]["warn_max"] = default / 4
    assert load(write_profile(smallest)).drift.signals["kl"].halt_max == default / 2


@pytest.mark.parametrize("limits", [ORDERED, RATIOS], ids="-".join)
def test_corridor_in_order_or_of_equal_limits_is_none_to_refuse(limits):
    for values in ([1.0, 2.0, 3.0, 4.0], [1.0] * 4):
        given = dict(zip(limits, values, strict=True))
        assert Corridor(**given).model_dump() | given == Corridor(**given).model_dump()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_limit_that_is_no_number_is_refused_by_its_setting(value, smallest, write_profile):
    """It would never be reached, and a fingerprint has no form for it."""
    smallest["drift"] = {"signals": {"reward": {"halt_max": value}}}
    with pytest.raises(InvalidProfile, match="halt_max"):
        load(write_profile(smallest))
