"""Training of the reward model on preference pairs, with TRL's RewardTrainer (Bradley-Terry loss)."""

import torch
from transformers import AutoModelForSequenceClassification

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.job import done, run
from tasks.jobs.models import load_tokenizer, lora_config
from tasks.jobs.training import rows, train, trl_args

from trl import RewardConfig, RewardTrainer  # isort: skip


def main(spec: JobSpec) -> JobResult:
    """Leave a stand-alone classification checkpoint (one logit), and its accuracy on held-out pairs as eval_accuracy."""
    tokenizer = load_tokenizer(spec)
    model = AutoModelForSequenceClassification.from_pretrained(
        spec.inputs["base_model"], revision=spec.config.get("revision"), num_labels=1,
        dtype=getattr(torch, spec.config["dtype"]),
    )  # fmt: skip
    model.config.pad_token_id = tokenizer.pad_token_id
    split = rows(spec, "rows").train_test_split(test_size=spec.config["eval_ratio"], seed=spec.seed)
    trainer = RewardTrainer(
        model=model,
        args=trl_args(RewardConfig, spec),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        peft_config=lora_config(spec.config["lora"], "SEQ_CLS"),
    )
    metrics = train(trainer, spec) | trainer.evaluate()
    if trainer.is_world_process_zero():
        trained = trainer.model.merge_and_unload() if spec.config["lora"] else trainer.model
        trained.save_pretrained(str(spec.output))
        tokenizer.save_pretrained(str(spec.output))
    return done(metrics, held_out_pairs=len(split["test"]))


if __name__ == "__main__":
    run(main)
