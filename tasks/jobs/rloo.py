"""REINFORCE with a leave-one-out baseline (arXiv:2402.14740) from the SFT adapter, with TRL's RLOOTrainer.

Departures from the paper are TRL's own and chosen by its arguments: `beta` (default 0.05), `normalize_advantages`.
"""

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.job import run
from tasks.jobs.models import load_tokenizer, load_trainable, save_adapter
from tasks.jobs.online import judges, reward_weights
from tasks.jobs.training import rows, train, trl_args

from trl import RLOOConfig, RLOOTrainer  # isort: skip


def main(spec: JobSpec) -> JobResult:
    """Leave the adapter; the reference of `kl` is the SFT policy (the base, if there was no SFT stage)."""
    tokenizer = load_tokenizer(spec)
    model, lora = load_trainable(spec)
    trainer = RLOOTrainer(
        model=model,
        args=trl_args(RLOOConfig, spec, reward_weights=reward_weights(spec)),
        train_dataset=rows(spec, "rows"),
        processing_class=tokenizer,
        peft_config=lora,
        **judges(spec, tokenizer),
    )
    result = train(trainer, spec)
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, tokenizer, spec)
    return result


if __name__ == "__main__":
    run(main)
