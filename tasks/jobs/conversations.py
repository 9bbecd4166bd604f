"""Conversations as chat templates want them, out of the canonical Parquet that keeps tool calls as JSON."""

import json
from typing import Any

from datasets import Dataset, Json, List

TEXTS = ("prompt", "completion", "chosen", "rejected", "messages")


def messages_of(text: Any) -> Any:
    """Return a text as it stands in the source: a string, or messages with only the keys that they had."""
    return [_turn(turn) for turn in text] if isinstance(text, list) else text


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools of a row, None where it has none: of an empty list some templates make an empty section."""
    return json.loads(row["tools"]) or None if "tools" in row else None


def with_tool_calls(dataset: Dataset) -> Dataset:
    """Return a dataset whose tool calls are objects again. Arrow alone would give every call the arguments of all."""
    if "tools" not in dataset.column_names:
        return dataset
    texts = [name for name in TEXTS if name in dataset.column_names]
    features = dataset.features.copy()
    features.update({name: List(Json()) for name in texts})

    def restored(row: dict[str, Any]) -> dict[str, Any]:
        return {name: messages_of(row[name]) for name in texts} | {"tools": row["tools"] if tools_of(row) else None}

    return dataset.map(restored, features=features)


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in turn.items() if value is not None}
    return kept | {"tool_calls": json.loads(kept["tool_calls"])} if "tool_calls" in kept else kept
