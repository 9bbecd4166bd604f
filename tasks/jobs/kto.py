"""Kahneman-Tversky optimisation (arXiv:2402.01306) from the SFT adapter, with TRL's KTOTrainer."""

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.job import run
from tasks.jobs.models import load_tokenizer, load_trainable, save_adapter
from tasks.jobs.training import prove_rows, rows, train, trl_args

from trl import KTOConfig, KTOTrainer  # isort: skip


def main(spec: JobSpec) -> JobResult:
    """Leave the adapter; the reference is the SFT policy (the base, if there was no SFT stage).

    The trainer reads its rows in their order, because each is paired with its neighbour's answer for the KL term: in a file
    that is sorted by label whole batches would have one label. So they are shuffled here, by the recipe's seed.
    """
    tokenizer, data = load_tokenizer(spec), rows(spec, "rows").shuffle(seed=spec.seed)
    model, lora = load_trainable(spec)
    trainer = KTOTrainer(
        model=model,
        args=trl_args(KTOConfig, spec),
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
