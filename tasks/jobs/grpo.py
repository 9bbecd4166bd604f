"""Group relative policy optimisation (arXiv:2402.03300) from the SFT adapter, with TRL's GRPOTrainer.

Departures from the paper are TRL's own and chosen by its arguments: `loss_type` (default "dapo"), `scale_rewards`, `beta`.
"""

import logging

from transformers import AutoConfig

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import vllm_cpu
from tasks.jobs.callbacks import FrozenWeights
from tasks.jobs.job import done, run
from tasks.jobs.models import load_tokenizer, load_trainable, on_cpu, save_adapter
from tasks.jobs.online import judges, reward_weights
from tasks.jobs.training import rows, train, trl_args

SYNC_TOLERANCE = 0.1  # mean |log p(trainer) - log p(vLLM)|: beyond it the rollouts are not the policy's


def main(spec: JobSpec) -> JobResult:
    """Leave the adapter; the reference of `kl` is the SFT policy (the base, if there was no SFT stage)."""
    rollouts, why = choose_rollouts(spec)
    logging.getLogger(__name__).warning("rollouts: %s%s", rollouts, f" ({why})" if why else "")
    if rollouts == "transformers":
        from tasks.jobs import without_vllm  # noqa: F401
    elif on_cpu():
        vllm_cpu.prepare(spec.config["dtype"])
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(spec)
    model, lora = load_trainable(spec)
    trainer = GRPOTrainer(
        model=model,
        args=trl_args(GRPOConfig, spec, reward_weights=reward_weights(spec), use_vllm=rollouts == "vllm"),
        train_dataset=rows(spec, "rows"),
        processing_class=tokenizer,
        peft_config=lora,
        **judges(spec, tokenizer),
    )
    if rollouts == "vllm":
        trainer.add_callback(FrozenWeights(trainer.model))
    result = train(trainer, spec)
    if rollouts == "vllm":
        _assert_synced(result.metrics)
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, tokenizer, spec)
    return done(result.metrics, **result.details, rollouts=rollouts, rollouts_reason=why)


def choose_rollouts(spec: JobSpec) -> tuple[str, str | None]:
    """Return what generates the rollouts, and why it is not vLLM; raises if vLLM was asked for and cannot."""
    asked = spec.config["rollouts"]
    if asked == "transformers":
        return asked, None
    config = AutoConfig.from_pretrained(spec.inputs["base_model"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    why = vllm_cpu.obstacle(head_dim)
    if why is None:
        return "vllm", None
    if asked == "vllm":
        raise RuntimeError(f"recipe.policy.rollouts is 'vllm' but {why}; set it to transformers or auto")
    return "transformers", why


def _assert_synced(metrics: dict[str, float]) -> None:
    difference = metrics["sampling/sampling_logp_difference/mean"]
    if difference > SYNC_TOLERANCE:
        raise RuntimeError(
            f"vLLM's and the trainer's log probabilities differ by {difference:.3f} nats per token on average (limit "
            f"{SYNC_TOLERANCE}): the rollouts were not the policy's own. Set recipe.policy.rollouts: transformers."
        )


if __name__ == "__main__":
    run(main)
