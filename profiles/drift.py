"""The profile's `drift` block: where each signal of the policy stage may go, what a halt does, how retrains are compared.

Defaults are rules of thumb for small runs, each with its source beside it; entropy's scale in particular varies with vocabulary
and task, so every number is a setting.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from profiles.strict import Strict

LIMITS = ("warn_min", "warn_max", "halt_min", "halt_max")


def _in_order(settings: Strict, lower: str, upper: str) -> None:
    """Refuse a limit that fails before it warns."""
    low, high = getattr(settings, lower), getattr(settings, upper)
    if low is not None and high is not None and low > high:
        raise ValueError(f"has {lower} {low} above {upper} {high}: it would fail before it warns")


class Corridor(Strict):
    """Limits of one signal's moving average; outside for `patience` log steps in a row it warns, or halts.

    `*_ratio_*` are multiples of the median over the first `reference_steps` log steps, and hold after them. `*_slope_max`
    limit the growth per log step over the last `window`, as a share of that median.
    """

    warn_min: float | None = None
    warn_max: float | None = None
    halt_min: float | None = None
    halt_max: float | None = None
    warn_ratio_min: float | None = Field(None, gt=0)
    warn_ratio_max: float | None = Field(None, gt=0)
    halt_ratio_min: float | None = Field(None, gt=0)
    halt_ratio_max: float | None = Field(None, gt=0)
    warn_slope_max: float | None = Field(None, gt=0)
    halt_slope_max: float | None = Field(None, gt=0)
    smoothing: float = Field(0.3, gt=0, le=1, description="weight of the newest value in the moving average; 1: none")
    patience: int = Field(3, gt=0)
    reference_steps: int = Field(10, gt=0)
    window: int = Field(20, ge=3)

    @model_validator(mode="after")
    def _ordered(self) -> "Corridor":
        for unit in ("", "ratio_"):
            low = [v for v in (getattr(self, f"halt_{unit}min"), getattr(self, f"warn_{unit}min")) if v is not None]
            high = [v for v in (getattr(self, f"warn_{unit}max"), getattr(self, f"halt_{unit}max")) if v is not None]
            if (low + high) != sorted(low + high):
                raise ValueError(
                    f"has halt_{unit}min ≤ warn_{unit}min ≤ warn_{unit}max ≤ halt_{unit}max out of order ({low + high}): it "
                    "would halt before it warns"
                )
        _in_order(self, "warn_slope_max", "halt_slope_max")
        return self


AXOLOTL = "axolotl docs/training_stability.qmd"  # the source of most levels; in nats per token where it applies
SIGNALS: dict[str, dict[str, Any]] = {
    # AXOLOTL: good 0 to 0.5, stop above 2.0
    "kl": {"warn_max": 0.5, "halt_max": 2.0},
    # AXOLOTL: stop below 0.01. The ratio: 12 of 12 collapses and none of 30 healthy small GRPO runs, tasks/monitoring/drift.py
    "entropy": {"halt_min": 0.01, "warn_ratio_min": 0.5, "halt_ratio_min": 0.25, "warn_ratio_max": 3.0},
    # AXOLOTL: good below 0.8, stop at 1.0: no group tells a better answer from a worse one, so nothing is learnt. Patient,
    # for with few groups in a step it is 1.0 now and then by chance
    "frac_reward_zero_std": {"warn_max": 0.8, "halt_max": 0.99, "patience": 20},
    # AXOLOTL: good below 0.3, stop above 0.8
    "completions/clipped_ratio": {"warn_max": 0.3, "halt_max": 0.8},
    # no limit that halts: reasoning models are meant to grow (DeepSeek-R1, arXiv:2501.12948); clipped_ratio is the wall
    "completions/mean_length": {"warn_ratio_max": 3.0, "warn_slope_max": 0.1},
    # AXOLOTL: good below 1, stop above 10. The scale is the parametrisation's (DPO starts higher), so it only warns
    "grad_norm": {"warn_max": 10.0},
    # AXOLOTL: good below 0.1, stop above 1.0
    "sampling/sampling_logp_difference/mean": {"warn_max": 0.1, "halt_max": 1.0},
    # AXOLOTL: good below 0.1, stop above 0.3
    "clip_ratio/region_mean": {"warn_max": 0.1, "halt_max": 0.3},
}


# What TRL 1.12 logs, by method; a corridor around anything else would never judge.
_ANY = ("loss", "grad_norm", "learning_rate", "entropy", "kl", "num_tokens", "mean_token_accuracy")
_CANARIES = ("canary/reward", "canary/kl", "canary/entropy", "canary/length")
_LENGTHS = ("mean", "min", "max", "mean_terminated", "min_terminated", "max_terminated")
LOGGED: dict[str, tuple[str, ...]] = {
    "grpo": (
        *_ANY, *_CANARIES, "reward", "reward_std", "frac_reward_zero_std", "completions/clipped_ratio", "step_time",
        *(f"completions/{which}_length" for which in _LENGTHS),
        *(f"clip_ratio/{which}" for which in ("region_mean", "low_mean", "low_min", "high_mean", "high_max")),
        *(f"sampling/sampling_logp_difference/{which}" for which in ("mean", "max")),
        *(f"sampling/importance_sampling_ratio/{which}" for which in ("mean", "min", "max")),
    ),
    "rloo": (
        *_ANY, *_CANARIES, "reward", "reward_std", "frac_reward_zero_std", "completions/clipped_ratio", "step_time",
        *(f"completions/{which}_length" for which in _LENGTHS),
        *(f"clip_ratio/{which}" for which in ("region_mean", "low_mean", "low_min", "high_mean", "high_max")),
    ),
    "kto": (
        *_ANY, *_CANARIES, "rewards/margins",
        *(f"{what}/{which}" for what in ("rewards", "logps", "logits") for which in ("chosen", "rejected")),
    ),
    "dpo": (
        *_ANY, *_CANARIES, *(f"rewards/{which}" for which in ("chosen", "rejected", "accuracies", "margins")),
        *(f"{what}/{which}" for what in ("logps", "logits") for which in ("chosen", "rejected")),
    ),
}  # fmt: skip


class RewardHacking(Strict):
    """The held-out reward's moving average fell from its best by this much, while the training reward did not fall."""

    warn_drop: float = Field(0.1, gt=0, description="of `canary/reward`, in the scorer's own unit")
    halt_drop: float | None = Field(0.2, gt=0)
    smoothing: float = Field(0.3, gt=0, le=1)
    patience: int = Field(3, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "RewardHacking":
        _in_order(self, "warn_drop", "halt_drop")
        return self


class Cusum(Strict):
    """One-sided CUSUM (Page 1954) on log(kl / target): it warns of a runaway before the level is reached."""

    target: float = Field(0.1, gt=0, description="nats per token")
    slack: float = Field(0.5, ge=0)
    warn_sum: float = Field(5.0, gt=0)


class Canaries(Strict):
    """The first rows of datasets.eval, which the policy answers while it trains and never trains on."""

    num_prompts: int = Field(32, ge=0, description="0: none; then kl is known only where the trainer logs it")
    every: int = Field(1, gt=0, description="log steps from one measurement to the next")
    max_new_tokens: int | None = Field(None, gt=0, description="default: recipe.evaluate.max_new_tokens")
    batch_size: int = Field(16, gt=0)


class Retry(Strict):
    """What a restart from the last good checkpoint changes: TRL arguments, each times its factor, at every restart again."""

    max_retries: int = Field(1, gt=0)
    change: dict[str, float] = Field(default_factory=lambda: {"learning_rate": 0.5}, min_length=1)

    @model_validator(mode="after")
    def _changes(self) -> "Retry":
        for name, factor in self.change.items():
            if factor <= 0 or factor == 1:
                raise ValueError(f"has change.{name}: {factor}; a factor is above 0 and not 1, or the restart is no other run")
        return self


class BetweenRuns(Strict):
    """The canaries of a new policy against the median of the last accepted ones; a limit that fails stops the release."""

    last: int = Field(5, gt=0)
    reward_drop_warn: float = Field(0.05, ge=0)
    reward_drop_max: float | None = Field(0.15, ge=0)
    entropy_ratio_warn: float = Field(0.5, gt=0, lt=1)
    entropy_ratio_min: float | None = Field(0.25, gt=0, lt=1)
    kl_to_champion_warn: float = Field(0.5, gt=0, description="nats per token")
    kl_to_champion_max: float | None = Field(2.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "BetweenRuns":
        _in_order(self, "reward_drop_warn", "reward_drop_max")
        _in_order(self, "entropy_ratio_min", "entropy_ratio_warn")
        _in_order(self, "kl_to_champion_warn", "kl_to_champion_max")
        return self


class Drift(Strict):
    """What judges the policy stage while it trains, and its result against those before it."""

    signals: dict[str, Corridor | None] = Field(
        default_factory=lambda: {name: Corridor(**limits) for name, limits in SIGNALS.items()},
        description="corridors by the trainer's own metric names, over the defaults; null takes one away",
    )
    reward_hacking: RewardHacking | None = RewardHacking()
    kl_cusum: Cusum | None = Cusum()
    canaries: Canaries = Canaries()
    on_halt: Literal["stop", "rollback", "retry"] = Field(
        "stop", description="rollback: the chain goes on from the last good checkpoint; retry: training restarts from it"
    )
    retry: Retry = Retry()
    between_runs: BetweenRuns = BetweenRuns()

    @model_validator(mode="before")
    @classmethod
    def _over_the_defaults(cls, raw: Any) -> Any:
        """Lay the profile's corridors over the defaults, field by field."""
        given = raw.get("signals") if isinstance(raw, dict) else None
        if not isinstance(given, dict):
            return raw
        signals: dict[str, Any] = {name: dict(limits) for name, limits in SIGNALS.items()}
        for name, limits in given.items():
            signals[name] = signals.get(name, {}) | limits if isinstance(limits, dict) else limits
        return raw | {"signals": signals}
