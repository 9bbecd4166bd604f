"""Asks base, SFT and policy the same held-out questions and keeps every answer.

Greedy decoding, so nothing is random; the adapters are switched on one loaded base, so nothing else differs.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.answers import SEED, generate, log_probabilities, samples, scores_of, slices
from tasks.jobs.job import done, run
from tasks.jobs.models import load_base, load_tokenizer, on_cpu
from tasks.jobs.rewards import find_reward
from tasks.jobs.training import rows

Row = dict[str, Any]


def main(spec: JobSpec) -> JobResult:
    """Leave samples.jsonl (one line per row and model); metrics are `<metric>/<model>` in [0, 1]."""
    tokenizer = load_tokenizer(spec)
    model = load_models(spec)
    data, metric = rows(spec, "rows"), spec.config["metric"]
    judge = answers if metric == "accuracy" else preferences
    metrics: dict[str, float] = {}
    with (spec.output / "samples.jsonl").open("w", encoding="utf-8") as file:
        for name in ("base", *(name for name in model.peft_config if name != "champion")):
            with speaking(model, name):
                lines = judge(model, tokenizer, data, spec.config)
            metrics[f"{metric}/{name}"] = sum(line["score"] for line in lines) / len(lines)
            named = {"metric": metric, "model": name}
            file.writelines(json.dumps(named | {"row": i} | line) + "\n" for i, line in enumerate(lines))
    if "champion" in spec.inputs:
        metrics["canary/kl_to_champion"] = kl_to_champion(model, tokenizer, data, spec.config["canaries"])
    template = hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()
    comparable = {name: {"chat_template": template, "tasks": {}} for name in ("base", *model.peft_config)}
    return done(metrics, num_rows=len(data), device=str(model.device), comparable=comparable)


def kl_to_champion(model: PeftModel, tokenizer: Any, data: Dataset, settings: Row) -> float:
    """Return KL(policy || champion) on the policy's own answers to the canaries, in nats per token."""
    prompts = data.select(range(min(settings["num_prompts"], len(data))))["prompt"]
    torch.manual_seed(SEED)
    kl = tokens = 0.0
    for start in range(0, len(prompts), settings["batch_size"]):
        with speaking(model, "policy"):
            whole = samples(model, tokenizer, prompts[start : start + settings["batch_size"]], settings["max_new_tokens"])
        for batch in slices(model, whole):
            with speaking(model, "policy"):
                logp = log_probabilities(model, batch)
            with speaking(model, "champion"):
                other = log_probabilities(model, batch)
            kl += (logp.exp() * (logp - other)).sum(-1)[batch["mask"]].sum().item()
            tokens += batch["mask"].sum().item()
    return kl / tokens


def load_models(spec: JobSpec) -> PeftModel:
    """Return the base with each trained adapter under its stage's name; none is active yet."""
    names = [name for name in ("sft", "policy", "champion") if name in spec.inputs]
    model = PeftModel.from_pretrained(load_base(spec), spec.inputs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(spec.inputs[name], adapter_name=name)
    return model.to("cpu" if on_cpu() else "cuda").eval()


@contextmanager
def speaking(model: PeftModel, name: str) -> Iterator[None]:
    """Let the base, or one of the adapters, answer inside the block."""
    if name != "base":
        model.set_adapter(name)
    with torch.inference_mode(), model.disable_adapter() if name == "base" else nullcontext():
        yield


def answers(model: PeftModel, tokenizer: Any, data: Dataset, config: Row) -> list[Row]:
    """Return each row's greedy completion and its score: 1 if the scorer gives it 1.0, else 0."""
    scorer, lines = find_reward(config["scorer"]), []
    for start in range(0, len(data), config["batch_size"]):
        batch = data[start : start + config["batch_size"]]
        texts = generate(model, tokenizer, batch["prompt"], config["max_new_tokens"])
        scores = scores_of(scorer, texts, batch)
        lines += [
            {"prompt": prompt, "completion": text, "answer": answer, "score": int(score == 1.0)}
            for prompt, text, answer, score in zip(batch["prompt"], texts, batch["answer"], scores, strict=True)
        ]
    return lines


def preferences(model: PeftModel, tokenizer: Any, data: Dataset, config: Row) -> list[Row]:
    """Return for each pair whether the chosen reply is the likelier one, by mean log probability per token."""
    lines = []
    for row in data:
        chosen, rejected = (mean_logp(model, tokenizer, row["prompt"], row[side], config) for side in ("chosen", "rejected"))
        lines.append({"prompt": row["prompt"], "margin": chosen - rejected, "score": int(chosen > rejected)})
    return lines


def mean_logp(model: PeftModel, tokenizer: Any, prompt: Any, reply: Any, config: Row) -> float:
    """Return the mean log probability of the reply's tokens after the prompt, in nats per token."""
    if isinstance(prompt, str):
        start, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + reply + tokenizer.eos_token)["input_ids"]
    else:
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(prompt + reply)["input_ids"]
    ids = torch.tensor([whole[: config["max_length"]]], device=model.device)
    if ids.shape[1] <= len(start):
        raise RuntimeError(
            f"a prompt of {len(start)} tokens fills evaluate.max_length {config['max_length']}: its replies cannot be "
            "compared. Raise max_length, or take such rows out of the eval set."
        )
    logp = torch.log_softmax(model(ids).logits[0, len(start) - 1 : -1].float(), dim=-1)
    return logp.gather(-1, ids[0, len(start) :, None]).mean().item()


if __name__ == "__main__":
    run(main)
