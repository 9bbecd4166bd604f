"""Reward functions: TRL calls each with a batch's completions and the dataset's columns, and gets one float per completion.

A function's name here is its name in `recipe.policy.reward_functions` and `recipe.evaluate.scorer`. 1.0 means right.
"""

import difflib
import re
from typing import Any

Completion = str | list[dict[str, Any]]


def text_of(completion: Completion) -> str:
    """Return the assistant's text, of a standard or a conversational completion."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_answer(completions: list[Completion], answer: list[str], **_: Any) -> list[float]:
    """1.0 if the whole completion is the answer, white space aside."""
    return [float(text_of(c).split() == a.split()) for c, a in zip(completions, answer, strict=True)]


def number_answer(completions: list[Completion], answer: list[str], **_: Any) -> list[float]:
    """1.0 if the last number in the completion equals the answer; thousands commas do not count."""
    return [float(_last_number(text_of(c)) == _last_number(a)) for c, a in zip(completions, answer, strict=True)]


def near_answer(completions: list[Completion], answer: list[str], **_: Any) -> list[float]:
    """Partial credit in [0, 1]: how much of the answer's words the completion has in order (difflib's ratio)."""
    pairs = zip(completions, answer, strict=True)
    return [difflib.SequenceMatcher(None, text_of(c).split(), a.split(), autojunk=False).ratio() for c, a in pairs]


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None
