"""Whether a served model is the trained policy: each token it wrote is what the policy would have written there.

The policy (base + adapter in transformers) reads prompt and served answer in one pass. So every token is judged behind the
same text, also after a tie, and nothing depends on how the policy itself would have gone on.
"""

import hashlib
import json
import math
from typing import Any

import torch

# How far below the policy's best token a served one may be, in nats: the two engines round sums in another order. In float32
# they are 1e-5 apart. bfloat16 has 8 bits, so logits between 16 and 32 lie 0.125 apart: of 704 tokens of SmolLM2-135M (a DPO
# policy, 23 November 2026) 7 were not the policy's best one, six by 0.125 nats or less and one by 0.375.
TIE_MARGIN = {"float32": 1e-3, "bfloat16": 0.5}
# NeMo-RL's limit on its token_mult_prob_error is 1.05. In float32 it is 1.0000002, so there 1.001 is generous.
MULT_PROB_ERROR_MAX = {"float32": 1.001, "bfloat16": 1.05}
# What vLLM takes if told nothing.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def judged(logits: torch.Tensor, of_base: torch.Tensor, answer: dict[str, Any], eos_ids: list[int]) -> dict[str, Any]:
    """Return what the policy makes of a served answer.

    `logits` (tokens, vocabulary) are the policy's at the place of each served token, `of_base` the base's. `gaps` are nats
    below the policy's best token, `errors` are |log p(served) - log p(policy)| of the token written, `base_errors` those to the
    base.
    """
    ids, served = torch.tensor(answer["ids"])[:, None], torch.tensor(answer["logps"], dtype=torch.double)
    logp = torch.log_softmax(logits.double(), -1)
    own, base = logp.gather(-1, ids)[:, 0], torch.log_softmax(of_base.double(), -1).gather(-1, ids)[:, 0]
    return {
        "gaps": (logp.max(-1).values - own).tolist(),
        "errors": (served - own).abs().tolist(),
        "base_errors": (served - base).abs().tolist(),
        "best": logp.argmax(-1).tolist(),
        "stops_right": stops_right(answer, eos_ids),
    }


def stops_right(answer: dict[str, Any], eos_ids: list[int]) -> bool:
    """Tell whether the server stopped at the first end-of-sequence token, or at the limit of tokens without one."""
    ends = [place for place, token in enumerate(answer["ids"]) if token in eos_ids]
    if answer["finish"] == "stop":
        return ends == [len(answer["ids"]) - 1]
    return answer["finish"] == "length" and not ends


def verdict(probes: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """Return the summary of all probes, with `failures`: why the served model is not the trained policy; none if it is.

    A probe has `prompt_ids` (the server's), `rendered_ids` (the policy's tokenizer's) and what `judged` returns.
    """
    margin, failures = TIE_MARGIN[dtype], []
    gaps = [gap for probe in probes for gap in probe["gaps"]]
    error, base_error = (mean_factor([e for probe in probes for e in probe[name]]) for name in ("errors", "base_errors"))
    if not gaps:
        failures.append(f"{len(probes)} probes were answered with no token at all: nothing was compared")
    for number, probe in enumerate(probes):
        badness = [math.inf if math.isnan(gap) else gap for gap in probe["gaps"]]
        place = max(range(len(badness)), key=badness.__getitem__, default=0)
        worst = probe["gaps"][place] if badness else 0.0
        if probe["prompt_ids"] != probe["rendered_ids"]:
            failures.append(f"probe {number}: the server reads the prompt as other tokens: {_difference(probe)}")
        elif not worst <= margin:  # which NaN is not
            failures.append(
                f"probe {number}: token {place} of the answer is {probe['ids'][place]}, which the policy holds {worst:.3g} "
                f"nats below its own {probe['best'][place]} (a tie is up to {margin:g})"
            )
        elif not probe["stops_right"]:
            at = probe["ids"][-3:]
            failures.append(f"probe {number}: it ends by {probe['finish']!r} after the tokens {at}, where the policy does not")
    limit = MULT_PROB_ERROR_MAX[dtype]
    if not error <= limit:
        failures.append(f"probabilities of the same tokens differ by a factor of {error:.4f} (limit {limit})")
    elif not error < base_error:
        failures.append(
            f"the served probabilities are as near to the base's (a factor of {base_error:.6f}) as to the policy's "
            f"({error:.6f}): the base may be what is served, or the training is lost in rounding"
        )
    exact = [max(probe["gaps"], default=0.0) == 0.0 for probe in probes]
    return {
        "num_probes": len(probes),
        "num_tokens": len(gaps),
        "greedy_match_ratio": _mean(exact),
        "gap_max": max(gaps, default=0.0),
        "token_mult_prob_error": error,
        "token_mult_prob_error_of_base": base_error,
        "tie_margin": margin,
        "token_mult_prob_error_max": limit,
        "failures": failures,
    }


def other_defaults(served: dict[str, Any], exported: dict[str, Any]) -> list[str]:
    """Return in which sampling parameters a request that names none is served otherwise than the export says."""
    found = {name: served.get(name, neutral) for name, neutral in SAMPLING.items()}
    found["top_k"] = max(0, found["top_k"])  # -1 is vLLM's other word for all
    wanted = {name: exported.get(name, neutral) for name, neutral in SAMPLING.items()}
    wrong = [name for name in SAMPLING if found[name] != wanted[name]]
    told = [f"by default {name} is {found[name]:g} where the export says {wanted[name]:g}" for name in wrong]
    most = exported.get("max_new_tokens")
    if most and served.get("max_tokens") != most:
        told.append(f"by default max_tokens is {served.get('max_tokens')} where the export says max_new_tokens {most}")
    return told


def digest(template: str | dict[str, str] | None) -> str:
    """Return the hash by which chat templates are compared: of the one, or of all by their names; none is the empty text."""
    text = json.dumps(template, sort_keys=True) if isinstance(template, dict) else template or ""
    return hashlib.sha256(text.encode()).hexdigest()


def mean_factor(errors: list[float]) -> float:
    """Return the mean of exp|error|; a probability of 0 on one side, which vLLM writes as -9999 nats, counts as e^50."""
    return _mean([math.exp(min(error, 50.0)) if error == error else math.nan for error in errors])


def _difference(probe: dict[str, Any]) -> str:
    served, ours = probe["prompt_ids"], probe["rendered_ids"]
    pairs = enumerate(zip(served, ours, strict=False))
    place = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(served), len(ours)))
    return (
        f"{len(served)} tokens for {len(ours)}, from token {place} on {served[place : place + 4]} for {ours[place : place + 4]}"
    )


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else 0.0
