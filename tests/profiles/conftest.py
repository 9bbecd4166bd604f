"""A smallest valid profile to start from, and a file to put a changed one in."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SMALLEST = {
    "description": "GRPO with a fresh adapter, rewarded by a function",
    "recipe": {
        "base_model": {"path": "models/tiny"},
        "datasets": {
            "prompts": {"path": "prompts.jsonl", "kind": "prompt_only"},
            "eval": {"path": "eval.jsonl", "kind": "eval"},
        },
        "policy": {"method": "grpo", "lora": {"r": 8}, "reward_functions": [{"name": "exact_answer"}]},
    },
}


@pytest.fixture
def smallest() -> dict[str, Any]:
    """The smallest profile that loads, as a mapping to change."""
    return copy.deepcopy(SMALLEST)


@pytest.fixture
def write_profile(tmp_path: Path) -> Callable[..., str]:
    """Write a mapping (or text) as <name>.yaml and return its path, which is how a profile of one's own is named."""

    def write(content: Any, name: str = "own") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write
