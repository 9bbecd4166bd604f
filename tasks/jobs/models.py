"""Loads base models, tokenizers and adapters from a JobSpec's inputs, the same way in every job."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tasks.job_spec import JobSpec


def load_tokenizer(spec: JobSpec) -> PreTrainedTokenizerBase:
    """Return the base model's tokenizer; one without a padding token pads with its EOS token, and TRL masks by length."""
    tokenizer = AutoTokenizer.from_pretrained(spec.inputs["base_model"], revision=spec.config.get("revision"))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(spec: JobSpec) -> PreTrainedModel:
    """Return the base model in the recipe's dtype."""
    return AutoModelForCausalLM.from_pretrained(
        spec.inputs["base_model"], revision=spec.config.get("revision"), dtype=getattr(torch, spec.config["dtype"])
    )


def load_trainable(spec: JobSpec) -> tuple[PreTrainedModel, LoraConfig | None]:
    """Return the model the policy starts from, and a fresh LoRA if there is no SFT adapter to go on with.

    With an SFT adapter TRL copies it to a frozen adapter named "ref": the reference is the SFT policy, not the base.
    """
    base = load_base(spec)
    if "sft" not in spec.inputs:
        return base, lora_config(spec.config["lora"], "CAUSAL_LM")
    return PeftModel.from_pretrained(base, spec.inputs["sft"], is_trainable=True), None


def lora_config(lora: dict[str, Any] | None, task_type: str) -> LoraConfig | None:
    """Return PEFT's config for the profile's LoRA block."""
    return None if lora is None else LoraConfig(task_type=task_type, **lora)


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Save the trained adapter alone: TRL's frozen "ref" copy is not part of what was trained."""
    model.save_pretrained(str(output), selected_adapters=["default"])
    tokenizer.save_pretrained(str(output))
