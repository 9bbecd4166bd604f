"""Merges the policy's adapter into the base, and certifies that the result is base + (alpha / r) B A and nothing else."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs.job import done, run
from tasks.jobs.models import BASE_FILE, load_base, load_tokenizer

# Mean KL(base + adapter || merged) on the probe, nats per token; bfloat16 keeps 8 bits of each merged weight. The probe
# is text: on token ids without sense a model amplifies rounding (SmolLM2 in bfloat16: 52 logits of difference, on text 1.75).
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
PROBE = "What does a careful engineer check before a release, and why?"


def main(spec: JobSpec) -> JobResult:
    """Leave the merged checkpoint with its tokenizer and certificate.json; raise if the certificate does not hold."""
    tokenizer = load_tokenizer(spec)
    base = {name: tensor.clone() for name, tensor in load_base(spec).state_dict().items()}
    model = PeftModel.from_pretrained(load_base(spec), spec.inputs["policy"]).eval()
    _assert_base(model, spec)
    probe = probe_ids(tokenizer)
    expected = {f"{name}.weight": module for name, module in _adapted(model)}
    deltas = {name: module.get_delta_weight("default") for name, module in expected.items()}
    with torch.inference_mode():
        before = model(probe).logits.float()
        merged = model.merge_and_unload(safe_merge=True)
        after = merged(probe).logits.float()
    certificate = certify(base, merged.state_dict(), deltas) | agreement(before, after)
    limit = TOLERANCE[spec.config["dtype"]]
    if certificate["kl_mean"] > limit:
        raise RuntimeError(f"merged and unmerged model differ by {certificate['kl_mean']:.3g} nats per token (limit {limit})")
    merged.save_pretrained(str(spec.output))
    tokenizer.save_pretrained(str(spec.output))
    _assert_saved(spec, certificate["num_tensors"])
    (spec.output / "certificate.json").write_text(json.dumps(certificate, indent=1))
    return done({name: float(value) for name, value in certificate.items() if isinstance(value, int | float)})


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the token ids of the probe, as a user's turn where the model has a chat template."""
    if not tokenizer.chat_template:
        return tokenizer(PROBE, return_tensors="pt")["input_ids"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def agreement(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Return how far two logit tensors (1, tokens, vocabulary) are apart."""
    log_p, log_q = torch.log_softmax(before, -1), torch.log_softmax(after, -1)
    return {
        "logits_max_abs_diff": (before - after).abs().max().item(),
        "kl_mean": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "top_1_agreement": (before.argmax(-1) == after.argmax(-1)).float().mean().item(),
    }


def certify(base: dict, merged: dict, deltas: dict) -> dict:
    """Return the certificate; raises if a key, shape or untouched tensor differs, or if the merge changed nothing."""
    if base.keys() != merged.keys():
        raise RuntimeError(f"merged checkpoint has other tensors than the base: {sorted(base.keys() ^ merged.keys())[:5]}")
    worst = 0.0
    for name, tensor in base.items():
        if name in deltas:
            error = (merged[name].double() - (tensor.double() + deltas[name].double())).abs().max().item()
            worst = max(worst, error / max(tensor.abs().max().item(), 1e-8))
        elif not torch.equal(tensor, merged[name]):
            raise RuntimeError(f"{name} is no adapted tensor, yet the merge changed it")
    if worst > 1e-2:
        raise RuntimeError(f"an adapted tensor is off base + (alpha/r) B A by {worst:.3g} of its largest value (limit 0.01)")
    changed = sum(not torch.equal(base[name], merged[name]) for name in deltas)
    if not changed:
        raise RuntimeError("the merged weights equal the base: the adapter trained nothing, or was not merged")
    return {"num_tensors": len(base), "num_adapted": len(deltas), "num_changed": changed, "weight_error_max": worst}


def _adapted(model: PeftModel):
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {}):
            yield name.removeprefix(prefix), module


def _assert_base(model: PeftModel, spec: JobSpec) -> None:
    """Refuse an adapter that was trained on another base (LlamaFactory#6105, #3096); its bytes count, not its path."""
    file = Path(spec.inputs["policy"]) / BASE_FILE
    if file.is_file():
        trained_on, here = json.loads(file.read_text())["digest"], spec.config["base_digest"]
    else:  # an adapter from elsewhere says a path
        trained_on, here = model.peft_config["default"].base_model_name_or_path, spec.inputs["base_model"]
    if trained_on != here:
        raise RuntimeError(f"the adapter was trained on the base {trained_on!r}, and the base here is {here!r}")


def _assert_saved(spec: JobSpec, num_tensors: int) -> None:
    """Read the written files back; a tied head is stored once, so at most that many tensors may be absent."""
    keys = set()
    for path in spec.output.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            keys |= set(file.keys())
    if not num_tensors - 1 <= len(keys) <= num_tensors:
        raise RuntimeError(f"the saved checkpoint has {len(keys)} tensors, the model {num_tensors}")


if __name__ == "__main__":
    run(main)
