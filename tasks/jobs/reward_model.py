"""Training of the reward model on preference pairs, with TRL's RewardTrainer (Bradley-Terry loss)."""

import json
import random

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.job import done, run
from tasks.jobs.models import load_tokenizer, lora_config
from tasks.jobs.training import prove_rows, rows, train, trl_args

from trl import RewardConfig, RewardTrainer  # isort: skip


def main(spec: JobSpec) -> JobResult:
    """Leave a stand-alone classification checkpoint (one logit); on held-out pairs eval_accuracy, eval_ece and eval_brier."""
    tokenizer, args = load_tokenizer(spec), trl_args(RewardConfig, spec)  # it sets the seed that the head is drawn by
    model = AutoModelForSequenceClassification.from_pretrained(
        spec.inputs["base_model"], num_labels=1, dtype=getattr(torch, spec.config["dtype"]),
    )  # fmt: skip
    model.config.pad_token_id = tokenizer.pad_token_id
    training, held_out = split_by_prompt(rows(spec, "rows"), spec.config["eval_ratio"], spec.seed)
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora_config(spec.config["lora"], "SEQ_CLS"),
    )
    prove_rows(spec, trainer.train_dataset, trainer.eval_dataset)
    metrics = train(trainer, spec).metrics | trainer.evaluate() | calibration(held_out_margins(trainer))
    if trainer.is_world_process_zero():
        trained = trainer.model.merge_and_unload() if spec.config["lora"] else trainer.model
        trained.save_pretrained(str(spec.output))
        tokenizer.save_pretrained(str(spec.output))
    return done(metrics, held_out_pairs=len(held_out))


def held_out_margins(trainer: RewardTrainer) -> torch.Tensor:
    """Return each held-out pair's reward of chosen minus rejected."""
    margins = []
    trainer.model.eval()
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            rewards = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1).float()
            chosen, rejected = rewards.chunk(2)
            margins.append(trainer.accelerator.gather_for_metrics(chosen - rejected))
    return torch.cat(margins)


def calibration(margins: torch.Tensor, num_bins: int = 10) -> dict[str, float]:
    """Return how far the model's certainty is from its accuracy, both 0 at best.

    `eval_ece` is the expected calibration error over bins of σ|Δ| (arXiv:1706.04599), `eval_brier` the mean of (1 − σ(Δ))².
    """
    certainty, right = torch.sigmoid(margins.abs()), (margins > 0).float()
    bins = ((certainty - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    gaps = [(certainty[bins == b] - right[bins == b]).sum().abs() for b in range(num_bins)]
    return {
        "eval_ece": float(torch.stack(gaps).sum() / len(margins)),
        "eval_brier": float(((1 - torch.sigmoid(margins)) ** 2).mean()),
    }


def split_by_prompt(pairs: Dataset, ratio: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return training and held-out pairs; all pairs of a prompt are on one side, or the accuracy would flatter."""
    prompts = [json.dumps(prompt) for prompt in pairs["prompt"]]
    unique = sorted(set(prompts))
    random.Random(seed).shuffle(unique)
    hidden = set(unique[: max(1, round(ratio * len(unique)))])
    sides = {True: [], False: []}
    for number, prompt in enumerate(prompts):
        sides[prompt in hidden].append(number)
    return pairs.select(sides[False]), pairs.select(sides[True])


if __name__ == "__main__":
    run(main)
