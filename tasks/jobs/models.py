"""Loads base models, tokenizers and adapters from a JobSpec's inputs, the same way in every job."""

import json
import os
import re
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tasks.job_spec import JobSpec

BASE_FILE = "base.json"  # beside an adapter: the digest of the base it was trained on


def on_cpu() -> bool:
    """Tell whether this job computes on the CPU: no GPU here, or the accelerate file says so."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def load_tokenizer(spec: JobSpec) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the newest adapter was trained with, else the base's.

    SFT may have changed it (`eos_token`, `chat_template_path`), and what follows must speak as it learned to. One without a
    padding token pads with its EOS token; TRL masks by length.
    """
    return tokenizer_of(spec.inputs.get("policy") or spec.inputs.get("sft") or spec.inputs["base_model"])


def tokenizer_of(folder: str) -> PreTrainedTokenizerBase:
    """Return a folder's tokenizer; one without a padding token pads with its EOS token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(spec: JobSpec) -> PreTrainedModel:
    """Return the base model in the recipe's dtype."""
    return load_whole(spec.inputs["base_model"], spec.config["dtype"])


def own_dtype(folder: str) -> str:
    """Return the dtype that a model was merged in, or released with."""
    return str(AutoConfig.from_pretrained(folder).dtype or "float32").removeprefix("torch.")


def load_released(folder: str) -> PreTrainedModel:
    """Return a merged or released model in its own dtype."""
    return load_whole(folder, own_dtype(folder))


def load_whole(folder: str, dtype: str) -> PreTrainedModel:
    """Return a folder's full weights in a dtype; on the CPU the head gets its input in one piece.

    Generation and TRL keep only some positions, and of such a slice PyTorch 2.13 makes one product per row, which in bfloat16
    takes 5.3 s where one product of all takes 0.09 s (48 rows of 25 positions, 49,152 tokens).
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if on_cpu():
        model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
    return model


def load_reward_model(spec: JobSpec) -> PreTrainedModel:
    """Return the trained reward model under the name that its metrics get: rewards/reward_model/mean, …"""
    model = AutoModelForSequenceClassification.from_pretrained(spec.inputs["reward_model"], num_labels=1)
    model.config._name_or_path = "reward_model"
    return model


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


def refuse_unmergeable(model: torch.nn.Module, spec: JobSpec) -> None:
    """Raise RuntimeError, before the first step, at an adapter that could not be merged into the base as it is.

    A name that matches no module is refused too: PEFT trains without it, with a warning at best.
    """
    if not isinstance(model, PeftModel) or model.peft_config["default"].task_type != "CAUSAL_LM":
        return
    config, base = model.peft_config["default"], model.get_base_model()
    parts = (base.get_input_embeddings(), base.get_output_embeddings())
    rows, here = AutoConfig.from_pretrained(spec.inputs["base_model"]).get_text_config().vocab_size, len(parts[0].weight)
    if rows != here or config.trainable_token_indices:
        raise RuntimeError(
            f"args.chat_template_path added tokens or resized the embedding ({rows} rows in the base, {here} now): the merged "
            "checkpoint would not be the base's shape. Put the tokens into the base model, or give a template without new ones."
        )
    is_adapted = any(isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) for part in parts)
    if is_adapted and base.config.get_text_config().tie_word_embeddings:
        raise RuntimeError(
            "lora.target_modules or lora.modules_to_save has the embedding or the head, and this base ties the two: trained "
            "apart they can no longer be one tensor. Leave both out, or untie the base model first."
        )
    _refuse_unmatched(config, base)


def _refuse_unmatched(config: LoraConfig, base: torch.nn.Module) -> None:
    adapted = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    whole = [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, setting):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in adapted):
                raise RuntimeError(
                    f"lora.{setting} has {key!r}, which is the end of no adapted module's name, as {adapted[0]!r}"
                )
    for end in config.modules_to_save or ():
        if not any(name.endswith(end) for name in whole):
            raise RuntimeError(f"lora.modules_to_save has {end!r}, and no module's name ends so: nothing would be trained")


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, spec: JobSpec) -> None:
    """Save the trained adapter alone, and which base it is for: TRL's frozen "ref" copy is not part of what was trained.

    The same training leaves the same bytes, wherever it ran: PEFT writes the base's path on this machine, also into a README,
    and a set's members in the order of the day, and what follows would be built again for it.
    """
    model.save_pretrained(str(spec.output), selected_adapters=["default"])
    (spec.output / "README.md").unlink()
    file = spec.output / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": None}
    ordered = {name: sorted(value) if isinstance(value, list) else value for name, value in config.items()}
    file.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(str(spec.output))
    (spec.output / BASE_FILE).write_text(json.dumps({"digest": spec.config["base_digest"]}))
