"""Supervised fine-tuning of a LoRA adapter on the base model, with TRL's SFTTrainer."""

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import without_vllm  # noqa: F401  (before trl: importing vLLM costs seconds that only rollouts need)
from tasks.jobs.job import run
from tasks.jobs.models import load_base, load_tokenizer, lora_config, save_adapter
from tasks.jobs.training import prove_rows, rows, train, trl_args

from trl import SFTConfig, SFTTrainer  # isort: skip


def main(spec: JobSpec) -> JobResult:
    tokenizer, data = load_tokenizer(spec), rows(spec, "rows")
    trainer = SFTTrainer(
        model=load_base(spec),
        args=trl_args(SFTConfig, spec),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_config(spec.config["lora"], "CAUSAL_LM"),
    )
    prove_rows(spec, trainer.train_dataset, packing=trainer.args.packing)
    result = train(trainer, spec, len(data))
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, tokenizer, spec)
    return result


if __name__ == "__main__":
    run(main)
