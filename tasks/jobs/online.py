"""What the methods that sample have in common: who judges their completions, and by which columns."""

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase

from tasks.job_spec import JobSpec
from tasks.jobs.models import load_reward_model
from tasks.jobs.rewards import find_reward

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # by TRL, besides columns


def columns_of(name: str) -> list[str]:
    """Return the columns that a reward function cannot do without."""
    asked = inspect.signature(find_reward(name)).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in asked if p.default is p.empty and p.kind in kinds and p.name not in GIVEN]


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
