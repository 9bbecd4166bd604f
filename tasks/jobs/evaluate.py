"""Asks base, SFT and policy the same held-out questions and keeps every answer.

Greedy decoding, so nothing is random; the adapters are switched on one loaded base, so nothing else differs.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import without_vllm  # noqa: F401
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
        for name in ("base", *model.peft_config):
            with speaking(model, name):
                lines = judge(model, tokenizer, data, spec.config)
            metrics[f"{metric}/{name}"] = sum(line["score"] for line in lines) / len(lines)
            file.writelines(json.dumps({"model": name, "row": i} | line) + "\n" for i, line in enumerate(lines))
    return done(metrics, num_rows=len(data), device=str(model.device))


def load_models(spec: JobSpec) -> PeftModel:
    """Return the base with each trained adapter under its stage's name; none is active yet."""
    names = [name for name in ("sft", "policy") if name in spec.inputs]
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


def scores_of(scorer: Callable, texts: list[str], batch: dict[str, list]) -> list[float]:
    """Call a reward function as TRL does: with completions in the prompt's form, and the row's columns."""
    chat = isinstance(batch["prompt"][0], list)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    columns = {name: values for name, values in batch.items() if name != "prompt"}
    return scorer(prompts=batch["prompt"], completions=completions, **columns)


def generate(model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int) -> list[str]:
    """Return the greedy completions of prompts.

    A base's own generation_config may hold a repetition penalty, which applies to greedy decoding too: it is left out, here
    as in the export. The chat template brings its special tokens itself; a plain text gets the tokenizer's, as in training.
    """
    texts = [render(tokenizer, prompt) for prompt in prompts]
    plain = isinstance(prompts[0], str)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=plain)
    greedy = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.generation_config = greedy  # generate() fills what its argument leaves open from here
    ids = model.generate(**inputs.to(model.device), generation_config=greedy, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def render(tokenizer: Any, prompt: str | list[Row]) -> str:
    """Return the text the model sees: the chat template's with its generation prompt, or the prompt as it is."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


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
