"""What scores on the same rows say: estimates, bounds of a difference, the test of a gain, and how many rows would decide.

Scores are 0/1, or 1/0.5/0 of a win rate, or real values. The first two are counted, which asks nothing of their distribution.
"""

from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, permutation_test, t

LEVEL = 0.95  # of a model's own two-sided interval, and of each of the two one-sided bounds of a difference
POWER = 0.8
NUM_RESAMPLES = 9999
BATCH = 500  # sign patterns at once: 4 MB per thousand rows
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A model's mean score with its two-sided 95 % interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """The mean of candidate minus other with its two one-sided 95 % bounds, which are together a 90 % interval.

    `variance` is that of one row's difference. `step` is the size of each difference that is not 0 where scores are counted,
    which gives the variance a least value under any supposed mean; None for real-valued scores.
    """

    value: float
    low: float
    high: float
    n: int
    variance: float
    step: float | None


def estimate(scores: np.ndarray) -> Estimate:
    """Return the mean with its 95 % interval: Wilson's of 0/1, Tango's of a win rate, Student's t of real-valued scores.

    Wilson 1927 (doi:10.1080/01621459.1927.10502953). A win rate is 0.5 plus half the difference of wins and losses.
    """
    scores, n = np.sort(np.asarray(scores, float)), len(scores)
    value = float(scores.mean())
    if np.isin(scores, (0, 1)).all():
        interval = binomtest(int(scores.sum()), n).proportion_ci(confidence_level=LEVEL, method="wilson")
        return Estimate(value, float(interval.low), float(interval.high), n)
    level = (1 + LEVEL) / 2
    if np.isin(scores, (0, 0.5, 1)).all():
        low, high = tango(int((scores == 1).sum()), int((scores == 0).sum()), n, level)
        return Estimate(value, 0.5 + low / 2, 0.5 + high / 2, n)
    return Estimate(value, *_t_bounds(scores, value, level, _span(scores)), n)


def difference(candidate: np.ndarray, other: np.ndarray) -> Difference:
    """Return how much better the candidate is on the same rows, in any order; raises ValueError for other numbers of rows."""
    delta, n = np.sort(_differences(candidate, other)), len(candidate)
    if step := _step(candidate, other):
        gained, lost = _counts(delta)
        low, high = tango(gained, lost, n, LEVEL)
        mean = (gained - lost) / n
        variance = step**2 * ((gained + lost) / n - mean**2)
        return Difference(step * mean, step * low, step * high, n, variance, step)
    value, span = float(delta.mean()), _span(candidate, other)
    variance = float(delta.var())
    return Difference(value, *_t_bounds(delta, value, LEVEL, span), n, variance, None if variance else span)


def p_better(candidate: np.ndarray, other: np.ndarray) -> tuple[float, str]:
    """Return the one-sided p-value of the candidate being no better, and the name of the test.

    Counted scores: McNemar 1947 (doi:10.1007/BF02295996), exact, as the binomial test of the rows that differ; of a win rate it
    is the sign test. Real values: signs of the rows' differences flipped at random, the same ones each time.
    """
    delta = np.sort(_differences(candidate, other))
    if _step(candidate, other):
        gained, lost = _counts(delta)
        p = binomtest(gained, gained + lost, alternative="greater").pvalue if gained + lost else 1.0
        return float(p), "one-sided exact McNemar" if _step(candidate, other) == 1 else "one-sided sign test"
    p = permutation_test(
        (delta,), np.mean, permutation_type="samples", vectorized=True, n_resamples=NUM_RESAMPLES, batch=BATCH,
        alternative="greater", rng=np.random.default_rng(SEED),
    ).pvalue  # fmt: skip
    return float(p), "one-sided permutation test"


def tango(gained: int, lost: int, n: int, level: float) -> tuple[float, float]:
    """Return the one-sided bounds at `level` each of the difference of two shares on the same rows.

    The score interval of Tango 1998 (Stat Med 17:891-908): the differences that the score test does not refuse, with the
    likeliest share of losses under each.
    """
    z = norm.ppf(level)

    def score(delta: float, sign: int) -> float:
        b = -gained - lost + (2 * n - gained + lost) * delta
        root = sqrt(max(b * b + 8 * n * lost * delta * (1 - delta), 0.0))
        share = (root - b) / (4 * n)
        return gained - lost - n * delta - sign * z * sqrt(max(n * (2 * share + delta * (1 - delta)), 0.0))

    value, beside = (gained - lost) / n, 1e-12  # without rows that differ the estimate itself is a root too
    low = brentq(score, -1, value - beside, args=(1,)) if lost < n else -1.0
    high = brentq(score, value + beside, 1, args=(-1,)) if gained < n else 1.0
    return low, high


def rows_for_floor(scores: np.ndarray, least: float) -> int | None:
    """Return how many rows would tell the mean from `least` with power 0.8, were it the true one; None if they are equal."""
    level, value = (1 + LEVEL) / 2, float(np.mean(scores))
    if np.isin(scores, (0, 1)).all():
        return _rows(value - least, least * (1 - least), value * (1 - value), level)
    if np.isin(scores, (0, 0.5, 1)).all():
        return rows_for_difference(difference(scores, np.full(len(scores), 0.5)), least - 0.5, level)
    return rows_for_difference(difference(scores, np.zeros(len(scores))), least, level)


def rows_for_difference(d: Difference, limit: float, level: float = LEVEL) -> int | None:
    """Return how many rows would tell the difference from `limit` with power 0.8, were it the true one; None if they are equal.

    Connor 1987 (Biometrics 43:207-211). Under the limit at least as many rows must differ as it takes to come to it.
    """
    supposed = d.variance
    if d.step:
        supposed = max(d.variance + d.value**2, abs(limit) * d.step) - limit**2
    return _rows(d.value - limit, supposed, d.variance, level)


def rows_for_gain(d: Difference, least: float, level: float) -> int | None:
    """Return how many rows would decide a gain of at least `least`, were the one seen the true one; None if none would.

    A gain beyond `least` must be told from 0 by the test at `level`, and its estimate must come out at `least` or more; one
    below it must be told from `least` by its interval. Each with power 0.8.
    """
    if d.value <= least:
        return rows_for_difference(d, least)
    estimate = ceil((norm.ppf(POWER) * sqrt(d.variance) / (d.value - least)) ** 2)
    return max(rows_for_difference(d, 0.0, level) or 1, estimate if least else 1)


def _rows(gap: float, supposed: float, variance: float, level: float) -> int | None:
    if gap == 0:
        return None
    return ceil(((norm.ppf(level) * sqrt(max(supposed, 0.0)) + norm.ppf(POWER) * sqrt(variance)) / gap) ** 2)


def _differences(candidate: np.ndarray, other: np.ndarray) -> np.ndarray:
    if len(candidate) != len(other):
        raise ValueError(f"{len(candidate)} rows cannot be paired with {len(other)}")
    return np.asarray(candidate, float) - np.asarray(other, float)


def _counts(delta: np.ndarray) -> tuple[int, int]:
    return int((delta > 0).sum()), int((delta < 0).sum())


def _step(candidate: np.ndarray, other: np.ndarray) -> float | None:
    """Return 1 for 0/1 against 0/1, 0.5 for a win rate (1/0.5/0 against 0.5), else None."""
    if np.isin(candidate, (0, 1)).all() and np.isin(other, (0, 1)).all():
        return 1.0
    if np.equal(other, 0.5).all() and np.isin(candidate, (0, 0.5, 1)).all():
        return 0.5
    return None


def _span(*scores: np.ndarray) -> float:
    """Return how far scores lie apart, 0 counted as one of them."""
    every = np.concatenate([*scores, [0.0]])
    return float(every.max() - every.min())


def _t_bounds(values: np.ndarray, mean: float, level: float, span: float) -> tuple[float, float]:
    """Return Student's one-sided bounds of a mean; where all values are equal, which has no variance, Wilson's times `span`."""
    n = len(values)
    if values[0] == values[-1]:
        z = norm.ppf(level)
        half = span * z**2 / (n + z**2)
    else:
        half = float(t.ppf(level, n - 1) * values.std(ddof=1) / sqrt(n))
    return mean - half, mean + half
