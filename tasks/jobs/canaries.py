"""Fixed held-out prompts that the policy answers while it trains: a reward it is not trained on, and its exact KL and entropy.

KL and entropy are computed from the full next-token distributions at the tokens of the policy's own samples, in nats per token:
the Rao-Blackwellized estimate, unbiased and of less variance than a sampled one (arXiv:2504.10637).
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from tasks.job_spec import JobSpec
from tasks.jobs.answers import SEED, encoded, log_probabilities, samples, scores_of, slices
from tasks.jobs.callbacks import of_training
from tasks.jobs.rewards import find_reward

log = logging.getLogger(__name__)


class Canaries(TrainerCallback):
    """Logs `canary/reward`, `canary/kl`, `canary/entropy`, `canary/length`, and `kl` and `entropy` where the trainer does not.

    The reference is the policy as it was when this was made: before training, and before a checkpoint is loaded. It draws from
    a random generator of its own, so training is the same with and without it.
    """

    def __init__(self, trainer: Trainer, data: Dataset, spec: JobSpec):
        settings = spec.drift["canaries"]
        self.trainer, self.tokenizer = trainer, trainer.processing_class
        self.every, self.batch_size = settings["every"], settings["batch_size"]
        self.max_new_tokens = settings["max_new_tokens"]
        self.scorer = find_reward(settings["scorer"]) if settings["scorer"] else None
        self.data = data.select(range(min(settings["num_prompts"], len(data))))
        self.start = [(p, p.detach().clone()) for p in trainer.model.parameters() if p.requires_grad]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not of_training(logs):
            return
        number = state.global_step // state.logging_steps
        if number % self.every and number != 1 and state.global_step < state.max_steps:
            return
        measured = self.measured()
        measured |= {name: measured[f"canary/{name}"] for name in ("kl", "entropy") if name not in logs}
        logs.update(measured)
        if state.log_history:
            state.log_history[-1].update(measured)

    def measured(self) -> dict[str, float]:
        """Return rank 0's measurement: the others may differ in the last digit."""
        with apart(self.trainer.model):
            metrics = (
                dict.fromkeys(("canary/kl", "canary/entropy"), math.nan)
                if self._is_broken()
                else self._metrics([self._answers(start) for start in range(0, len(self.data), self.batch_size)])
            )
        if self.trainer.accelerator.num_processes > 1:
            metrics = broadcast_object_list([metrics])[0]
        return metrics

    def _is_broken(self) -> bool:
        """Tell whether the next token's distribution is no distribution any more: to sample from it would end the process."""
        inputs = encoded(self.tokenizer, self.data[: self.batch_size]["prompt"]).to(self.trainer.model.device)
        return not torch.isfinite(self.trainer.model(**inputs, logits_to_keep=1).logits).all()

    def _answers(self, start: int) -> dict[str, Any]:
        prompts = self.data[start : start + self.batch_size]["prompt"]
        return samples(self.trainer.model, self.tokenizer, prompts, self.max_new_tokens)

    def _metrics(self, answered: list[dict[str, Any]]) -> dict[str, float]:
        kl = entropy = tokens = 0.0
        for batch in (part for whole in answered for part in slices(self.trainer.model, whole)):
            logp = log_probabilities(self.trainer.model, batch)
            with self._at_start():
                reference = log_probabilities(self.trainer.model, batch)
            kl += (logp.exp() * (logp - reference)).sum(-1)[batch["mask"]].sum().item()
            entropy -= (logp.exp() * logp).sum(-1)[batch["mask"]].sum().item()
            tokens += batch["mask"].sum().item()
        texts = [text for batch in answered for text in batch["texts"]]
        found = {"canary/kl": kl / tokens, "canary/entropy": entropy / tokens, "canary/length": tokens / len(texts)}
        if self.scorer is not None:
            scores = scores_of(self.scorer, texts, self.data[:])
            found["canary/reward"] = sum(float(score) for score in scores) / len(scores)
        return found

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        """Give the trainable weights their first values inside the block."""
        now = [parameter.data for parameter, _ in self.start]
        for parameter, first in self.start:
            parameter.data = first
        try:
            yield
        finally:
            for (parameter, _), value in zip(self.start, now, strict=True):
                parameter.data = value


def add_canaries(trainer: Trainer, data: Dataset, spec: JobSpec) -> None:
    """Let the policy answer the canaries while it trains, if its weights are whole on every rank."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        log.warning("drift.canaries are not measured: the weights are sharded. kl is known only where the trainer logs it.")
        return
    trainer.add_callback(Canaries(trainer, data, spec))


@contextmanager
def apart(model: torch.nn.Module) -> Iterator[None]:
    """Let the model answer inside the block, and leave training as if nobody had asked: mode, draws, generation settings."""
    training, config = model.training, model.generation_config
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(SEED)
            yield
    finally:
        model.generation_config = config
        model.train(training)
