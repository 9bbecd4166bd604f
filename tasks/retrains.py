"""A policy against the last accepted ones of its profile: MLflow is the history, the canaries are what is compared."""

from dataclasses import dataclass
from statistics import median

from profiles.drift import BetweenRuns
from profiles.schema import Profile
from tasks.artifacts import Artifact
from tasks.monitoring import mlflow_runs
from tasks.pipeline_run import PipelineRun

SIGNALS = ("canary/reward", "canary/entropy", "canary/kl", "canary/length", "canary/kl_to_champion")


@dataclass(frozen=True)
class Drifted:
    """How far a policy's canaries are from the accepted ones', beyond which limit, and whether that stops its release."""

    fails: bool
    text: str
    signal: str
    value: float
    limit: float


def past_canaries(profile: Profile, policy: Artifact, key: str) -> list[dict[str, float]]:
    """Return the canaries' values of the last accepted other policies, the newest first."""
    found: dict[str, dict[str, float]] = {}
    for past in mlflow_runs.accepted_runs(profile.name, but=policy.fingerprint):
        if past["tags"].get("canaries") == key:
            found.setdefault(past["tags"]["policy.fingerprint"], past["metrics"])
    return list(found.values())[: profile.drift.between_runs.last]


def looks(run: PipelineRun, policy: Artifact, evaluation: Artifact) -> int:
    """Count this policy as judged on these held-out rows; return how many of the profile were, this one with them."""
    rows = run.store.identity("evaluate", evaluation.fingerprint)["inputs"]["rows"]
    mlflow_runs.set_tags(run.mlflow_run_id, {"gate.rows": rows, "policy.fingerprint": policy.fingerprint})
    judged = mlflow_runs.pipeline_runs(run.profile.name, f"tags.`gate.rows` = '{rows}'", 1000)
    return len({past["tags"]["policy.fingerprint"] for past in judged} | {policy.fingerprint})


def compare(new: dict[str, float], past: list[dict[str, float]], limits: BetweenRuns) -> list[Drifted]:
    """Return what has drifted between the accepted runs and this one; nothing where there is nothing to compare with."""
    found: list[Drifted | None] = []
    before, reward = _median(past, "canary/reward"), new.get("canary/reward")
    if before is not None and reward is not None:
        text = f"canary/reward is {reward:.3f}, {before:.3f} in the last accepted runs (median of {len(past)}): a drop of"
        found.append(_beyond("canary/reward", before - reward, limits.reward_drop_warn, limits.reward_drop_max, text))
    before, entropy = _median(past, "canary/entropy"), new.get("canary/entropy")
    if before and entropy is not None:
        text = f"canary/entropy is {entropy:.3f}, {before:.3f} in the last accepted runs (median of {len(past)}): a ratio of"
        lowest = limits.entropy_ratio_min
        fail = None if lowest is None else -lowest
        found.append(_beyond("canary/entropy", -entropy / before, -limits.entropy_ratio_warn, fail, text))
    if (kl := new.get("canary/kl_to_champion")) is not None:
        text = "the policy's KL to the champion, in nats per token on the canaries, is"
        found.append(_beyond("canary/kl_to_champion", kl, limits.kl_to_champion_warn, limits.kl_to_champion_max, text))
    return [drifted for drifted in found if drifted is not None]


def leave_canaries(run: PipelineRun, policy: Artifact, key: str, canaries: dict[str, float]) -> None:
    """Leave in the run's MLflow tags and metrics what later runs are compared with, once this one is accepted."""
    tags = {"policy.stage": policy.stage, "policy.fingerprint": policy.fingerprint, "canaries": key}
    mlflow_runs.set_tags(run.mlflow_run_id, tags)
    mlflow_runs.log_scalars(run.mlflow_run_id, canaries)


def _beyond(signal: str, value: float, warn: float, fail: float | None, text: str) -> Drifted | None:
    fails = fail is not None and value > fail
    if not fails and value <= warn:
        return None
    what, limit = ("fail", fail) if fails else ("warn", warn)
    told = f"{text} {abs(value):.3f} ({what} limit {abs(limit):g} of drift.between_runs)."
    return Drifted(fails, told, signal, abs(value), abs(limit))


def _median(past: list[dict[str, float]], signal: str) -> float | None:
    values = [metrics[signal] for metrics in past if signal in metrics]
    return median(values) if values else None
