"""Direct preference optimisation (arXiv:2305.18290) from the SFT adapter, with TRL's DPOTrainer."""

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.job import run
from tasks.jobs.models import load_tokenizer, load_trainable, save_adapter
from tasks.jobs.training import prove_rows, rows, train, trl_args

from trl import DPOConfig, DPOTrainer  # isort: skip


def main(spec: JobSpec) -> JobResult:
    """Leave the adapter; the reference is the SFT policy (the base, if there was no SFT stage)."""
    tokenizer, data = load_tokenizer(spec), rows(spec, "rows")
    model, lora = load_trainable(spec)
    trainer = DPOTrainer(
        model=model,
        args=trl_args(DPOConfig, spec),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
    )
    prove_rows(spec, trainer.train_dataset)
    result = train(trainer, spec, len(data))
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, tokenizer, spec)
    return result


if __name__ == "__main__":
    run(main)
