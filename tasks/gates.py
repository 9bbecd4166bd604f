"""Pure predicates: every model's scores on the same rows in, reasons against the candidate out."""

from dataclasses import dataclass, field

from scipy.stats import binomtest

from profiles.schema import Gates


@dataclass(frozen=True)
class Estimate:
    """A share of right answers with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Verdict:
    """The gate's result: each reason names metric, n, estimate and limit."""

    passed: bool
    reasons: list[str] = field(default_factory=list)


def estimate(scores: list[int]) -> Estimate:
    """Return the share of ones with its 95 % Wilson interval (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    result = binomtest(sum(scores), len(scores))
    interval = result.proportion_ci(confidence_level=0.95, method="wilson")
    return Estimate(sum(scores) / len(scores), interval.low, interval.high, len(scores))


def mcnemar_p(candidate: list[int], other: list[int]) -> float:
    """Return the one-sided exact McNemar p-value of `candidate` being no better on paired 0/1 scores.

    McNemar 1947 (doi:10.1007/BF02295996), as the binomial test on the rows where the two differ.
    """
    gained = sum(c > o for c, o in zip(candidate, other, strict=True))
    lost = sum(c < o for c, o in zip(candidate, other, strict=True))
    return float(binomtest(gained, gained + lost, alternative="greater").pvalue) if gained + lost else 1.0


def judge(scores: dict[str, list[int]], gates: Gates, metric: str) -> Verdict:
    """Return whether the policy passes; `scores` maps base, sft and policy to 0/1 per row, in the same order."""
    policy = estimate(scores["policy"])
    reasons = []
    if gates.accuracy_min is not None and policy.low < gates.accuracy_min:
        reasons.append(
            f"{metric} of policy {policy.value:.3f} (n={policy.n}, 95 % {policy.low:.3f}..{policy.high:.3f}): the interval's "
            f"lower end is below gates.accuracy_min {gates.accuracy_min}"
        )
    for name in gates.better_than:
        p = mcnemar_p(scores["policy"], scores[name])
        if p >= gates.p_max:
            other = estimate(scores[name])
            reasons.append(
                f"{metric} of policy {policy.value:.3f} is not shown to be better than {name} {other.value:.3f} "
                f"(n={policy.n}, one-sided exact McNemar p={p:.3g}, gates.p_max {gates.p_max})"
            )
    return Verdict(not reasons, reasons)
