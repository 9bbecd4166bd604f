"""What each stage logs, by TRL's own keys, and what a person is shown of it."""

# The metric that stands for a stage in the summary table: the first of these that it logged.
KEY_METRIC = {
    "sft": ("mean_token_accuracy",),
    "reward_model": ("eval_accuracy",),
    "grpo": ("reward",),
    "rloo": ("reward",),
    "dpo": ("rewards/accuracies",),
    "kto": ("rewards/margins",),
    "evaluate": ("accuracy/policy", "preference_accuracy/policy"),
    "merge": ("logits_max_abs_diff",),
    "export": ("greedy_match_ratio",),
}


def key_metric(stage: str, metrics: dict[str, float]) -> str | None:
    """Return the stage's key metric as `name value`, or None if it logged none; rows that do not train are never untold."""
    if bad := metrics.get("data/quarantined_rows"):
        return f"{bad:.0f} bad rows set aside"
    name = next((name for name in KEY_METRIC.get(stage, ()) if name in metrics), None)
    return None if name is None else f"{name} {metrics[name]:.3g}"


# Curves of the report, in the order a reader asks: does it learn, does it stay close, does it stay diverse.
_SAMPLED = (
    *("reward", "canary/reward", "kl", "entropy"),
    *("completions/mean_length", "completions/clipped_ratio", "loss", "grad_norm"),
)
CURVES = {
    "sft": ("loss", "mean_token_accuracy", "entropy"),
    "reward_model": ("loss", "accuracy", "margin"),
    "grpo": _SAMPLED,
    "rloo": _SAMPLED,
    "dpo": ("loss", "rewards/accuracies", "rewards/margins", "canary/reward", "kl", "entropy", "canary/length", "grad_norm"),
    "kto": ("loss", "rewards/margins", "canary/reward", "canary/kl", "entropy", "canary/length", "grad_norm"),
}

MEANING = {
    "loss": "training loss",
    "mean_token_accuracy": "share of supervised tokens that the model ranks first",
    "entropy": "mean entropy of the next-token distribution, nats per token",
    "accuracy": "share of pairs whose chosen answer gets the higher reward",
    "eval_accuracy": "the same on held-out pairs",
    "eval_ece": "expected calibration error of its certainty on held-out pairs, 0 at best (arXiv:1706.04599)",
    "margin": "mean reward of chosen minus rejected",
    "reward": "mean total reward of the rollouts, after weights",
    "kl": "estimate of KL(policy || reference), nats per token (k3 estimator, http://joschu.net/blog/kl-approx.html)",
    "completions/mean_length": "mean length of the rollouts, tokens",
    "completions/clipped_ratio": "share of rollouts that reached max_completion_length without an end",
    "grad_norm": "norm of the gradient before clipping",
    "canary/reward": "mean score of the canaries, held-out prompts sampled at temperature 1",
    "canary/kl": "exact KL(policy || start) on the canaries' answers, nats per token (arXiv:2504.10637)",
    "canary/entropy": "mean entropy on the canaries' answers, nats per token",
    "canary/length": "mean length of the canaries' answers, tokens",
    "canary/kl_to_champion": "exact KL(policy || last accepted policy) on the canaries' answers, nats per token",
    "rewards/accuracies": "share of pairs whose chosen answer has the higher implicit reward",
    "rewards/margins": "mean implicit reward of the chosen (KTO: desirable) answers minus the rejected ones",
    "accuracy/policy": "share of held-out prompts answered right, greedy decoding",
    "logits_max_abs_diff": "largest difference between the logits of base + adapter and of the merged checkpoint",
    "greedy_match_ratio": "share of probes on which vLLM and the trained policy write the same tokens",
}
