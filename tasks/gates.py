"""The gate: every model's scores on the same rows in, one verdict and one claim per thing asked out. Pure.

PASS, FAIL and INCONCLUSIVE are three answers: shown, shown not to be so, and not enough rows to tell. Only PASS releases.
All claims must hold, so each has the whole level: a gate of several claims only gets stricter (intersection-union test,
Berger 1982, doi:10.1080/00401706.1982.10487790).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from profiles.schema import Gates
from tasks.errors import ProfileError
from tasks.paired import (
    Difference,
    Estimate,
    difference,
    estimate,
    p_better,
    rows_for_difference,
    rows_for_floor,
    rows_for_gain,
)

Answer = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Scores = Mapping[str, Mapping[str, Sequence[float]]]
Arrays = dict[str, dict[str, np.ndarray]]
WIN_RATE = "win_rate/"
OWN = (WIN_RATE, "reward/")  # before the slash of any other metric stands a task of lm-evaluation-harness
EVEN = 0.5  # the win rate of a model against its equal


@dataclass(frozen=True)
class Claim:
    """One thing that the gate asks and what the rows say of it, with its numbers; None where there is no number.

    `estimate` is the policy's own value of a floor, with its 95 % interval, and its difference to the other model otherwise,
    with a 90 % interval, each end of which is a one-sided 95 % bound.
    """

    asked: str
    verdict: Answer
    text: str
    metric: str
    n: int | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What the gate came to: FAIL if a claim fails, else INCONCLUSIVE if one is, else PASS."""

    verdict: Answer
    claims: list[Claim]

    @property
    def open(self) -> list[Claim]:
        """The claims that did not pass."""
        return [claim for claim in self.claims if claim.verdict != "PASS"]


@dataclass(frozen=True)
class Other:
    """The model that a claim compares the policy with, and what the claim calls it."""

    name: str
    label: str


def judge(scores: Scores, gates: Gates, metric: str, comparable: dict[str, Any] | None) -> Verdict:
    """Return the verdict on the policy.

    `scores` maps metric and model to a score per row, in the same order, higher is better; `metric` is the one of
    `gates.better_than` where `gates.metric` is null. `comparable` says what each model was asked with, as
    `{model: {"chat_template": hash, "tasks": {task: hash}}}`: one asked otherwise is not compared (None: all were asked alike).

    Raises ProfileError for a metric that was not measured, ValueError for rows that are missing, not finite or not paired.
    """
    arrays = {name: _checked(name, models) for name, models in scores.items()}
    asked = {frozenset(models) for name, models in arrays.items() if not name.startswith(WIN_RATE)}
    if len(asked) > 1:
        raise ValueError(f"not every metric was measured for the same models: {[sorted(models) for models in asked]}")
    return weigh(list(_claims(arrays, gates, gates.metric or metric, comparable)))


def weigh(claims: list[Claim]) -> Verdict:
    """Return the verdict that claims come to together."""
    answers = {claim.verdict for claim in claims}
    return Verdict(next((answer for answer in ("FAIL", "INCONCLUSIVE") if answer in answers), "PASS"), claims)


def estimates(scores: Scores) -> dict[str, dict[str, Estimate]]:
    """Return every model's own value of every metric, with its 95 % interval."""
    return {metric: {name: estimate(np.asarray(own)) for name, own in models.items()} for metric, models in scores.items()}


def _claims(arrays: Arrays, gates: Gates, metric: str, comparable: dict[str, Any] | None) -> Iterator[Claim]:
    for asked, least in gates.floors.items():
        name = _measured(arrays, asked, "gates.floors")
        yield _floor(name, arrays[name]["policy"], least)
    name = _measured(arrays, metric, "gates.metric") if gates.better_than else metric
    for other in _others(arrays, name, gates.better_than):
        apart = _apart(comparable, name, other, "gates.better_than")
        yield apart or _better(name, arrays[name]["policy"], _scores_of(arrays, name, other), other, gates)
    for asked, margin in gates.not_worse.items():
        name = _measured(arrays, asked, "gates.not_worse")
        [other] = _others(arrays, name, ["champion"])
        apart = _apart(comparable, name, other, "gates.not_worse")
        _refuse_wide(name, arrays[name]["policy"], _scores_of(arrays, name, other), margin)
        yield apart or _not_worse(name, arrays[name]["policy"], _scores_of(arrays, name, other), other, margin)


def _floor(metric: str, scores: np.ndarray, least: float) -> Claim:
    e = estimate(scores)
    text = f"{metric} of the policy is {e.value:.3f} (n={e.n}, 95 % interval {e.low:.3f} to {e.high:.3f})"
    limit = f"gates.floors asks for {least:g}"
    if e.low >= least:
        verdict, text = "PASS", f"{text}: {limit}, and the whole interval is there or above."
    elif e.high < least:
        verdict, text = "FAIL", f"{text}: {limit}, and the whole interval is below."
    else:
        more = _more(rows_for_floor(scores, least), e.n)
        verdict, text = "INCONCLUSIVE", f"{text}: {limit}, which lies in the interval. {more}"
    return Claim("floor", verdict, text, metric, e.n, e.value, e.low, e.high, least)


def _better(metric: str, policy: np.ndarray, scores: np.ndarray, other: Other, gates: Gates) -> Claim:
    d = difference(policy, scores)
    p, test = p_better(policy, scores)
    limit = f"gates.gain_min {gates.gain_min:g}"
    text = f"{_compared(metric, policy, scores, other, d)}, {test} p={p:.3g}"
    if p < gates.p_max and d.value >= gates.gain_min and d.value > 0:
        verdict, text = "PASS", f"{text}: better, with p below gates.p_max {gates.p_max:g} and a gain of {limit} or more."
    elif d.high < gates.gain_min:
        verdict, text = "FAIL", f"{text}: not better, the whole interval is below {limit}."
    elif np.array_equal(policy, scores):
        verdict, text = "INCONCLUSIVE", f"{text}: a tie, every row has the same score, and a tie is not released."
    else:
        missed = [f"p is not below gates.p_max {gates.p_max:g}"] if p >= gates.p_max else []
        missed += [f"the gain is not {limit} or more"] if d.value < gates.gain_min else []
        rows = rows_for_gain(d, gates.gain_min, 1 - gates.p_max)
        why = " and ".join(missed) or "there is no gain"
        verdict, text = "INCONCLUSIVE", f"{text}: not shown to be better, {why}. {_more(rows, d.n)}"
    return Claim(f"better than {other.label}", verdict, text, metric, d.n, d.value, d.low, d.high, gates.gain_min, p)


def _not_worse(metric: str, policy: np.ndarray, scores: np.ndarray, other: Other, margin: float) -> Claim:
    d = difference(policy, scores)
    text = _compared(metric, policy, scores, other, d)
    limit = f"the margin {margin:g} of gates.not_worse"
    if d.low > -margin:
        verdict, text = "PASS", f"{text}: not worse by {limit} or more."
    elif d.high < -margin:
        verdict, text = "FAIL", f"{text}: worse by more than {limit}."
    else:
        more = _more(rows_for_difference(d, -margin), d.n)
        verdict, text = "INCONCLUSIVE", f"{text}: a loss of {limit} lies in the interval. {more}"
    return Claim(f"not worse than {other.label}", verdict, text, metric, d.n, d.value, d.low, d.high, -margin)


def _refuse_wide(metric: str, policy: np.ndarray, scores: np.ndarray, margin: float) -> None:
    """Raise ProfileError for a margin that no loss between two models with such scores could reach."""
    every = np.concatenate([policy, scores])
    span = float(every.max() - every.min())
    if 0 < span <= margin:
        raise ProfileError(
            f"gates.not_worse.{metric} is {margin:g}, but its scores lie within {span:g} of each other ({every.min():g} to "
            f"{every.max():g}): any loss would pass. Give the margin in points of the metric, for a share 0.03 or 0.05."
        )


def _compared(metric: str, policy: np.ndarray, scores: np.ndarray, other: Other, d: Difference) -> str:
    means = f"{policy.mean():.3f} against {scores.mean():.3f}" + ("" if metric.startswith(WIN_RATE) else f" of {other.label}")
    return f"{metric} of the policy is {means} (n={d.n}): {d.value:+.3f}, 90 % interval {d.low:+.3f} to {d.high:+.3f}"


def _more(rows: int | None, n: int) -> str:
    if rows is None:
        return "The estimate lies on the limit itself: no number of rows would tell the two apart."
    rows = max(rows, n + 1)
    unit = 10 ** max(len(str(rows)) - 2, 0)
    about = f"{-(-rows // unit) * unit:,}"  # two digits, rounded up: the estimate is no finer than that
    return f"About {about} rows would decide it with power 0.8, if the true value is the one seen (Connor 1987)."


def _measured(arrays: Arrays, asked: str, setting: str) -> str:
    """Return the metric's name in the scores: the champion's win rate is the base's where there is no champion."""
    kind, _, other = asked.partition("/")
    name = f"{WIN_RATE}{_other(arrays, other).name}" if f"{kind}/" == WIN_RATE else asked
    if name not in arrays:
        raise ProfileError(
            f"{setting} names {asked!r}, which the evaluation did not measure: nothing can be judged by it. It measured: "
            f"{', '.join(sorted(arrays))}. Name one of these, or add what is missing to recipe.evaluate."
        )
    return name


def _other(arrays: Arrays, name: str) -> Other:
    """Return the model of a name; where there is no champion yet the base stands in for it, and the claim says so."""
    known = WIN_RATE + name in arrays or any(name in own for own in arrays.values())
    if name == "champion" and not known:
        return Other("base", "base, as there is no champion yet")
    return Other(name, name)


def _others(arrays: Arrays, metric: str, names: Sequence[str]) -> list[Other]:
    """Return each model once, the base too where it is named beside a champion that is not there."""
    last = sorted(names, key=lambda name: name == "champion")  # a stand-in's label, which says why, over a plain base's
    found = {(other := _other(arrays, name)).name: other for name in last}
    for other in found.values():
        if metric.startswith(WIN_RATE) and metric != WIN_RATE + other.name:
            raise ProfileError(
                f"gates.metric {metric!r} says nothing about {other.name}, which gates.better_than names. Set "
                f"gates.better_than to [{metric.removeprefix(WIN_RATE)}], or gates.metric to {WIN_RATE}{other.name}."
            )
        if not metric.startswith(WIN_RATE) and other.name not in arrays[metric]:
            raise ProfileError(
                f"the gate compares {metric} with {other.name}, which the evaluation did not ask. It asked: "
                f"{', '.join(arrays[metric])}. Name one of these in gates.better_than."
            )
    return list(found.values())


def _scores_of(arrays: Arrays, metric: str, other: Other) -> np.ndarray:
    own = arrays[metric]
    return np.full(len(own["policy"]), EVEN) if metric.startswith(WIN_RATE) else own[other.name]


def _apart(comparable: dict[str, Any] | None, metric: str, other: Other, setting: str) -> Claim | None:
    """Return the claim that two models were asked different things, or None if they were asked the same."""
    if comparable is None:
        return None
    ours, theirs = comparable["policy"], comparable[other.name]
    what, mine, its = "chat template", ours["chat_template"], theirs["chat_template"]
    task = metric.rpartition("/")[0]
    if mine == its and task and not metric.startswith(OWN):
        what, mine, its = f"definition of task {task}", ours["tasks"][task], theirs["tasks"].get(task)
    if mine == its:
        return None
    text = (
        f"{metric} of the policy is not compared with that of {other.label}: the {what} differs (policy {str(mine)[:12]}, "
        f"{other.name} {str(its)[:12]}), so the two were asked different things. Give both the same one and evaluate again; if "
        f"it has to change, drop the claim from {setting} for this one release and let a person decide."
    )
    return Claim(f"comparable with {other.label}", "INCONCLUSIVE", text, metric)


def _checked(metric: str, models: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """Return the scores as arrays; raises ValueError for what must never become a verdict."""
    arrays = {name: np.asarray(own, float) for name, own in models.items()}
    lengths = {name: len(own) for name, own in arrays.items()}
    if "policy" not in arrays or len(set(lengths.values())) != 1 or not lengths["policy"]:
        raise ValueError(f"{metric} was not measured for the policy and the others on the same rows: rows by model {lengths}")
    for name, own in arrays.items():
        if not np.isfinite(own).all():
            row = int(np.flatnonzero(~np.isfinite(own))[0])
            raise ValueError(f"{metric} of {name} is {own[row]} in row {row}: a score that is not finite cannot be judged")
    if metric.startswith(WIN_RATE) and not np.isin(arrays["policy"], (0, EVEN, 1)).all():
        raise ValueError(f"{metric} has scores that are not 1, 0.5 or 0: it is no win rate")
    return arrays
