"""Whose answers the reward model prefers, row by row, and how much of that is length.

A reward model that trained the policy flatters it: the win rate shows what the policy has learned to please, not that it is
better. Length is the first thing such a model is pleased by, hence the length-controlled rate.
"""

from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
RIDGE = 1e-3  # on the length's weight alone, in nats: keeps it finite where length explains every win; moves rates by < 1e-3


def reward_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Any], texts: list[str], batch_size: int
) -> list[float]:
    """Return the reward model's logit of each answer, rendered and padded as TRL's GRPOTrainer does."""
    whole = [_rendered(tokenizer, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    scores: list[float] = []
    for start in range(0, len(whole), batch_size):
        batch = tokenizer(
            text=whole[start : start + batch_size], return_tensors="pt", padding=True, padding_side="right",
            add_special_tokens=False,
        ).to(model.device)  # fmt: skip
        with torch.inference_mode():
            scores += model(**batch).logits[:, 0].float().tolist()
    return scores


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: Any, text: str) -> str:
    if isinstance(prompt, str):
        return prompt + text
    return tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)


def compare(policy: list[tuple[str, float]], other: list[tuple[str, float]]) -> list[Row]:
    """Return a line per row: 1 where the policy's answer has the higher reward, 0 the lower, 0.5 for equal ones.

    Answers and rewards in the rows' order. Equal texts are equal, whatever padding did to their rewards' last digits.
    """
    lines = []
    for (text, reward), (other_text, other_reward) in zip(policy, other, strict=True):
        is_tie = text == other_text or reward == other_reward
        lines.append({
            "score": 0.5 if is_tie else float(reward > other_reward), "reward": reward, "other_reward": other_reward,
            "length": len(text), "other_length": len(other_text),
        })  # fmt: skip
    return lines


def length_controlled(scores: list[float], length_deltas: list[int]) -> float:
    """Return the win rate in [0, 1] that the policy would have with answers as long as the other's.

    AlpacaEval 2's length control (Dubois et al. 2024, arXiv:2404.04475, section 3): a logistic regression of the outcome on
    tanh(length difference / its standard deviation), read at a difference of 0. With a single pair of models the paper's
    instruction-difficulty term is not identified, and is left out. Lengths are in characters; a tie counts half. Where
    every difference is the same, length is told apart from nothing, and the plain rate is returned.
    """
    outcomes, deltas = np.asarray(scores, float), np.asarray(length_deltas, float)
    if outcomes.min() == outcomes.max() and outcomes[0] in (0.0, 1.0):
        return float(outcomes[0])  # no length explains what never varies, and its logit is infinite
    spread = deltas.std()
    lengths = np.tanh(deltas / spread) if spread else np.zeros_like(deltas)
    design = np.stack([np.ones_like(lengths), lengths], axis=1)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ weights
        nats = np.logaddexp(0, logits).sum() - outcomes @ logits + RIDGE / 2 * weights[1] ** 2
        return nats, design.T @ (expit(logits) - outcomes) + np.array([0.0, RIDGE * weights[1]])

    fitted = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-6})
    return float(expit(fitted.x[0]))
