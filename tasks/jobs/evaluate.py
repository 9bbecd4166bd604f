"""Asks base, SFT, policy and champion the same held-out questions and keeps every answer.

Greedy decoding, so nothing is random. SFT is an adapter switched on the loaded base. The policy is the merged checkpoint, which
is what will be served: in bfloat16 a merge rounds most of a small update away, and base + adapter would be judged in its place.
The champion is the export that is served, with its own weights, tokenizer and chat template.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.answers import SEED, generate, log_probabilities, samples, scores_of, slices
from tasks.jobs.job import done, run
from tasks.jobs.models import load_base, load_released, load_reward_model, load_tokenizer, on_cpu, tokenizer_of
from tasks.jobs.online import columns_of
from tasks.jobs.parity import digest
from tasks.jobs.rewards import find_reward
from tasks.jobs.training import rows

Row = dict[str, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speaker:
    """One of the compared models; those with adapters share `model`, in which `speaking` switches theirs on."""

    name: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase


def main(spec: JobSpec) -> JobResult:
    """Leave samples.jsonl: a line per metric, model and row. Metrics are `<metric>/<model>`: their means, and what has no rows.

    What can be wrong with the settings is raised before a model is loaded. `details["comparable"]` says by model what must be
    equal for two scores to mean the same: the chat template, and the hash of every lm-eval task as it was asked.
    """
    data, tasks = rows(spec, "rows"), find_tasks(spec)
    refuse_unanswerable(spec.config, data.column_names)
    chat = isinstance(data[0]["prompt"], list)
    by_vllm = measured_by_vllm(tasks, spec, chat)
    speakers = load_speakers(spec)
    lines, scalars, comparable, texts = [], {}, {}, {}
    for speaker in speakers:
        with speaking(speaker):
            own, texts[speaker.name] = asked(speaker, data, spec.config)
            found = by_vllm.get(speaker.name) or measured(speaker, tasks, spec, chat)
        lines += [{"model": speaker.name} | line for line in own + (found.lines if found else [])]
        scalars |= {f"{metric}/{speaker.name}": value for metric, value in found.scalars.items()} if found else {}
        hashes = found.hashes if found else {}
        comparable[speaker.name] = {"chat_template": digest(speaker.tokenizer.chat_template), "tasks": hashes}
    if spec.config["win_rate"]:
        won, values = win_rates(spec, data["prompt"], texts)
        lines, scalars = lines + won, scalars | values
    if "champion" in spec.inputs:
        scalars |= canary_of_champion(speakers, data, spec.config["canaries"])
    with (spec.output / "samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    device = str(speakers[0].model.device)
    return done(means(lines) | scalars, num_rows=len(data), device=device, comparable=comparable)


def means(lines: list[Row]) -> dict[str, float]:
    """Return `<metric>/<model>`: the mean score over the rows."""
    scores: dict[str, list[float]] = {}
    for line in lines:
        scores.setdefault(f"{line['metric']}/{line['model']}", []).append(line["score"])
    return {name: sum(own) / len(own) for name, own in scores.items()}


def refuse_unanswerable(config: Row, columns: list[str]) -> None:
    """Raise ValueError if a reward function asks for a column that the held-out rows do not have."""
    scorer = [("scorer", config["scorer"])] if config["metric"] == "accuracy" else []
    for setting, name in [*scorer, *(("rewards", name) for name in config["rewards"])]:
        if missing := [column for column in columns_of(name) if column not in columns]:
            raise ValueError(
                f"recipe.evaluate.{setting} has {name!r}, which reads {missing[0]!r}; the held-out rows have "
                f"{', '.join(columns)}. Map a column to it in recipe.datasets.eval.columns, or drop the function."
            )


def load_speakers(spec: JobSpec) -> list[Speaker]:
    """Return base, SFT, policy and champion, as far as they are inputs, in this order."""
    tokenizer, base = load_tokenizer(spec), load_base(spec)
    sft = spec.inputs.get("sft")
    model = in_place(PeftModel.from_pretrained(base, sft, adapter_name="sft") if sft else base)
    speakers = [Speaker(name, model, tokenizer) for name in ("base", *(["sft"] if sft else []))]
    speakers.append(Speaker("policy", in_place(load_released(spec.inputs["merge"])), tokenizer))
    if folder := spec.inputs.get("champion"):
        speakers.append(Speaker("champion", in_place(load_released(folder)), tokenizer_of(folder)))
    return speakers


def in_place(model: torch.nn.Module) -> Any:
    """Return the model where this job computes, ready to answer."""
    return model.to("cpu" if on_cpu() else "cuda").eval()


@contextmanager
def speaking(speaker: Speaker) -> Iterator[None]:
    """Let one of the models answer inside the block."""
    has_adapters = isinstance(speaker.model, PeftModel)
    if has_adapters and speaker.name != "base":
        speaker.model.set_adapter(speaker.name)
    bare = has_adapters and speaker.name == "base"
    with torch.inference_mode(), speaker.model.disable_adapter() if bare else nullcontext():
        yield


def asked(speaker: Speaker, data: Dataset, config: Row) -> tuple[list[Row], list[str]]:
    """Return a model's lines of the primary metric and of every reward function, and its greedy answers if some read them."""
    is_accuracy = config["metric"] == "accuracy"
    needs_texts = is_accuracy or config["rewards"] or config["win_rate"]
    texts = completions(speaker, data["prompt"], config) if needs_texts else []
    lines = answers(texts, data, config) if is_accuracy else preferences(speaker.model, speaker.tokenizer, data, config)
    for name in config["rewards"]:
        lines += reward_lines(name, texts, data)
    return lines, texts


def completions(speaker: Speaker, prompts: list[Any], config: Row) -> list[str]:
    """Return each prompt's greedy completion."""
    texts: list[str] = []
    for start in range(0, len(prompts), config["batch_size"]):
        batch = prompts[start : start + config["batch_size"]]
        texts += generate(speaker.model, speaker.tokenizer, batch, config["max_new_tokens"])
    return texts


def answers(texts: list[str], data: Dataset, config: Row) -> list[Row]:
    """Return each row's greedy completion and its score: 1 if the scorer gives it 1.0, else 0."""
    scores = scores_of(find_reward(config["scorer"]), texts, data[:])
    return [
        {"metric": "accuracy", "row": i, "score": int(score == 1.0), "prompt": prompt, "completion": text, "answer": answer}
        for i, (prompt, text, answer, score) in enumerate(zip(data["prompt"], texts, data["answer"], scores, strict=True))
    ]


def reward_lines(name: str, texts: list[str], data: Dataset) -> list[Row]:
    """Return a reward function's value of each row's completion; raises RuntimeError where it gives none."""
    scores = scores_of(find_reward(name), texts, data[:])
    if None in scores:
        raise RuntimeError(
            f"recipe.evaluate.rewards: {name} gives no score to row {scores.index(None)}, so the models cannot be compared on "
            "every row. Take such rows out of the eval set, or drop the function."
        )
    return [
        {"metric": f"reward/{name}", "row": i, "score": float(score), "response": text}
        for i, (text, score) in enumerate(zip(texts, scores, strict=True))
    ]


def preferences(model: PeftModel, tokenizer: Any, data: Dataset, config: Row) -> list[Row]:
    """Return for each pair whether the chosen reply is the likelier one, by mean log probability per token."""
    lines = []
    for i, row in enumerate(data):
        chosen, rejected = (mean_logp(model, tokenizer, row["prompt"], row[side], config) for side in ("chosen", "rejected"))
        score, margin = int(chosen > rejected), chosen - rejected
        lines.append({"metric": "preference_accuracy", "row": i, "score": score, "prompt": row["prompt"], "margin": margin})
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


def find_tasks(spec: JobSpec) -> Any:
    """Return the lm-eval tasks with their data, None if none are asked for: importing lm-eval takes seconds."""
    if not spec.config["tasks"]:
        return None
    from tasks.jobs import harness

    folder = Path(spec.inputs["task_folder"]) if "task_folder" in spec.inputs else None
    return harness.load_tasks(spec.config["tasks"], folder, spec.work / "cache")


def measured(speaker: Speaker, tasks: Any, spec: JobSpec, chat: bool) -> Any:
    """Return what lm-eval measured of a model that is loaded here, None if no task is asked for."""
    if tasks is None:
        return None
    from tasks.jobs import harness

    model = harness.loaded(speaker.model, speaker.tokenizer, spec.config["batch_size"])
    return harness.run_tasks(tasks, model, spec.config, seed=spec.seed, chat=chat)


def measured_by_vllm(tasks: Any, spec: JobSpec, chat: bool) -> dict[str, Any]:
    """Return what lm-eval measured of every model where vLLM answers its tasks, else nothing."""
    if tasks is None or spec.config["backend"] != "vllm":
        return {}
    from tasks.jobs import harness_vllm

    return harness_vllm.measure(tasks, spec, chat)


def win_rates(spec: JobSpec, prompts: list[Any], texts: dict[str, list[str]]) -> tuple[list[Row], dict[str, float]]:
    """Return the policy's lines against every other model, judged by the reward model, and the length-controlled rates."""
    from tasks.jobs import win_rate

    tokenizer, judge = load_tokenizer(spec), in_place(load_reward_model(spec))
    judge.config.pad_token_id = tokenizer.pad_token_id
    judged = {
        name: list(zip(own, win_rate.reward_scores(judge, tokenizer, prompts, own, spec.config["batch_size"]), strict=True))
        for name, own in texts.items()
    }
    lines, scalars = [], {}
    for other in (name for name in judged if name != "policy"):
        won = win_rate.compare(judged["policy"], judged[other])
        lines += [{"model": "policy", "metric": f"win_rate/{other}", "row": i} | line for i, line in enumerate(won)]
        deltas = [line["length"] - line["other_length"] for line in won]
        scalars[f"win_rate_lc/{other}/policy"] = win_rate.length_controlled([line["score"] for line in won], deltas)
    return lines, scalars


def canary_of_champion(speakers: list[Speaker], data: Dataset, settings: Row) -> dict[str, float]:
    """Return `canary/kl_to_champion`, or nothing where the two models do not speak in the same tokens."""
    by_name = {speaker.name: speaker for speaker in speakers}
    policy, champion = by_name["policy"], by_name["champion"]
    widths = [speaker.model.config.vocab_size for speaker in (policy, champion)]
    if policy.tokenizer.get_vocab() != champion.tokenizer.get_vocab() or widths[0] != widths[1]:
        log.warning("canary/kl_to_champion is left out: policy and champion have different vocabularies")
        return {}
    if not settings["num_prompts"]:
        return {}
    return {"canary/kl_to_champion": kl_to_champion(policy, champion, data, settings)}


def kl_to_champion(policy: Speaker, champion: Speaker, data: Dataset, settings: Row) -> float:
    """Return KL(policy || champion) on the policy's own answers to the canaries, in nats per token."""
    prompts = data.select(range(min(settings["num_prompts"], len(data))))["prompt"]
    torch.manual_seed(SEED)
    kl = tokens = 0.0
    for start in range(0, len(prompts), settings["batch_size"]):
        batch = prompts[start : start + settings["batch_size"]]
        with speaking(policy):
            whole = samples(policy.model, policy.tokenizer, batch, settings["max_new_tokens"])
        for part in slices(policy.model, whole):
            with speaking(policy):
                logp = log_probabilities(policy.model, part)
            with speaking(champion):
                other = log_probabilities(champion.model, part)
            kl += (logp.exp() * (logp - other)).sum(-1)[part["mask"]].sum().item()
            tokens += part["mask"].sum().item()
    return kl / tokens


if __name__ == "__main__":
    run(main)
