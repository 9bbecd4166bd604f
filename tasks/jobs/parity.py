"""Whether a served model is the trained policy: each token it wrote is what the policy would have written there.

The policy (base + adapter in transformers) reads prompt and served answer in one pass. So every token is judged behind the
same text, also after a tie, and nothing depends on how the policy itself would have gone on.
"""

import hashlib
import math
from typing import Any

import torch

# How far below the policy's best token a served one may be, in nats: the two engines round sums in another order. In float32
# they are 1e-5 apart. bfloat16 has 8 bits, so logits between 16 and 32 lie 0.125 apart: of 704 tokens of SmolLM2-135M (a DPO
# policy, 23 November 2026) 7 were not the policy's best one, six by 0.125 nats or less and one by 0.375.
TIE_MARGIN = {"float32": 1e-3, "bfloat16": 0.5}
MULT_PROB_ERROR_MAX = 1.05  # NeMo-RL's limit on its token_mult_prob_error
# What vLLM takes if told nothing.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def judged(logits: torch.Tensor, answer: dict[str, Any], eos_ids: list[int]) -> dict[str, Any]:
    """Return what the policy makes of a served answer.

    `logits` (tokens, vocabulary) are the policy's at the place of each served token. `gaps` are nats below the policy's best
    token, `errors` are |log p(served) - log p(policy)| of the token written.
    """
    logp = torch.log_softmax(logits.double(), -1)
    own = logp.gather(-1, torch.tensor(answer["ids"])[:, None])[:, 0]
    gaps = (logp.max(-1).values - own).tolist()
    errors = (torch.tensor(answer["logps"], dtype=torch.double) - own).abs().tolist()
    return {"gaps": gaps, "errors": errors, "best": logp.argmax(-1).tolist(), "stops_right": stops_right(answer, eos_ids)}


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
    error = _mean([math.exp(error) for probe in probes for error in probe["errors"]])
    for number, probe in enumerate(probes):
        worst = max(probe["gaps"], default=0.0)
        place = probe["gaps"].index(worst) if probe["gaps"] else 0
        if probe["prompt_ids"] != probe["rendered_ids"]:
            failures.append(f"probe {number}: the server reads the prompt as other tokens: {_difference(probe)}")
        elif worst > margin:
            failures.append(
                f"probe {number}: token {place} of the answer is {probe['ids'][place]}, which the policy holds {worst:.3g} "
                f"nats below its own {probe['best'][place]} (a tie is up to {margin:g})"
            )
        elif not probe["stops_right"]:
            at = probe["ids"][-3:]
            failures.append(f"probe {number}: it ends by {probe['finish']!r} after the tokens {at}, where the policy does not")
    if error > MULT_PROB_ERROR_MAX:
        failures.append(f"probabilities of the same tokens differ by a factor of {error:.4f} (limit {MULT_PROB_ERROR_MAX})")
    exact = [max(probe["gaps"], default=0.0) == 0.0 for probe in probes]
    return {
        "num_probes": len(probes),
        "num_tokens": len(gaps),
        "greedy_match_ratio": _mean(exact),
        "gap_max": max(gaps, default=0.0),
        "token_mult_prob_error": error,
        "tie_margin": margin,
        "token_mult_prob_error_max": MULT_PROB_ERROR_MAX,
        "failures": failures,
    }


def other_defaults(served: dict[str, Any], exported: dict[str, Any]) -> list[str]:
    """Return in which sampling parameters a request that names none is served otherwise than the export says."""
    found = {name: served.get(name, neutral) for name, neutral in SAMPLING.items()}
    found["top_k"] = max(0, found["top_k"])  # -1 is vLLM's other word for all
    wanted = {name: exported.get(name, neutral) for name, neutral in SAMPLING.items()}
    wrong = [name for name in SAMPLING if found[name] != wanted[name]]
    return [f"by default {name} is {found[name]:g} where the export says {wanted[name]:g}" for name in wrong]


def digest(template: str | None) -> str:
    """Return the hash by which chat templates are compared."""
    return hashlib.sha256((template or "").encode()).hexdigest()


def _difference(probe: dict[str, Any]) -> str:
    served, ours = probe["prompt_ids"], probe["rendered_ids"]
    pairs = enumerate(zip(served, ours, strict=False))
    place = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(served), len(ours)))
    return (
        f"{len(served)} tokens for {len(ours)}, from token {place} on {served[place : place + 4]} for {ours[place : place + 4]}"
    )


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else 0.0
