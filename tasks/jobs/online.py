"""What the methods that sample have in common: who judges their completions."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from tasks.job_spec import JobSpec
from tasks.jobs.models import load_reward_model
from tasks.jobs.rewards import find_reward


def judges(spec: JobSpec, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the trainer's arguments for the recipe's reward functions and the trained reward model, in the recipe's order."""
    names = [reward["name"] for reward in spec.config["reward_functions"]]
    return {
        "reward_funcs": [load_reward_model(spec) if name == "reward_model" else find_reward(name) for name in names],
        "reward_processing_classes": [tokenizer if name == "reward_model" else None for name in names],
    }


def reward_weights(spec: JobSpec) -> list[float]:
    """Return each reward function's weight, in the same order."""
    return [reward["weight"] for reward in spec.config["reward_functions"]]
