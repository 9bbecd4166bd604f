"""Reward functions: TRL calls each with a batch's completions and the dataset's columns, and gets one float per completion.

A function's name here is its name in `recipe.policy.reward_functions` and `recipe.evaluate.scorer`. 1.0 means right.
"""

import re
from collections.abc import Callable
from typing import Any

Completion = str | list[dict[str, Any]]


def find_reward(name: str) -> Callable[..., list[float]]:
    """Return the reward function named `name`: TRL's own (`trl.<name>`), or one of this file."""
    if name.startswith("trl."):
        import trl.rewards

        return getattr(trl.rewards, name.removeprefix("trl."))
    return globals()[name]


def text_of(completion: Completion) -> str:
    """Return the assistant's text, of a standard or a conversational completion."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_answer(completions: list[Completion], answer: list[str], **_: Any) -> list[float]:
    """1.0 if the whole completion is the answer, white space aside."""
    return [float(text_of(c).split() == a.split()) for c, a in zip(completions, answer, strict=True)]


def number_answer(completions: list[Completion], answer: list[str], **_: Any) -> list[float]:
    """1.0 if the completion ends in a number that equals the answer; thousands commas and a closing full stop do not count."""
    return [float(_final_number(text_of(c)) == _number(a)) for c, a in zip(completions, answer, strict=True)]


def math_answer(completions: list[Completion], answer: list[str], **_: Any) -> list[float]:
    """1.0 if the completion's final mathematical value equals the answer's, whatever its form (math-verify, via TRL)."""
    from trl.rewards import accuracy_reward

    chats = [[{"role": "assistant", "content": text_of(c)}] for c in completions]
    return [float(score or 0.0) for score in accuracy_reward(chats, solution=answer)]


def near_answer(completions: list[Completion], answer: list[str], **_: Any) -> list[float]:
    """1.0 if the completion is the answer, else up to 0.5 for the share of characters that stand in the right place."""
    return [_nearness(text_of(c).strip(), a.strip()) for c, a in zip(completions, answer, strict=True)]


def _nearness(text: str, answer: str) -> float:
    if text == answer:
        return 1.0
    in_place = sum(got == want for got, want in zip(text, answer, strict=False))
    return 0.5 * in_place / max(len(text), len(answer), 1)


def _number(answer: str) -> float:
    try:
        return float(answer.replace(",", ""))
    except ValueError:
        raise ValueError(f"number_answer reads numbers, and an answer is {answer!r}: use exact_answer or math_answer") from None


def _final_number(text: str) -> float | None:
    found = re.search(r"(-?\d[\d,]*(?:\.\d+)?)[.!\s]*$", text)
    return float(found[1].replace(",", "")) if found else None
