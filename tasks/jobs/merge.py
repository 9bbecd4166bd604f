"""Merges the policy's adapter into the base with PEFT, and certifies that what was written is base + (alpha / r) B A."""

import gc
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs.certificate import certify, refuse_quantised
from tasks.jobs.job import done, run
from tasks.jobs.models import BASE_FILE, load_base, load_tokenizer

# How far the merged model, loaded again, may be from base + adapter on the probes: `kl_mean` is KL(base + adapter || merged) in
# nats per token. bfloat16 keeps 8 bits of each merged weight. The probes are text: on token ids without sense a model amplifies
# rounding (SmolLM2 in bfloat16: 52 logits of difference). Two trained adapters of SmolLM2 on these 211 positions: 2e-11 nats,
# 1.3e-4 logits and top-1 1.0 in float32; of three in bfloat16, where a near tie may turn, 0.007 nats, 1.72 logits and 0.948 at
# worst. The base itself was 0.009 nats from one of them: the merged model must be nearer to base + adapter than the base is.
LIMITS = {
    "float32": {"kl_mean": 1e-5, "logits_max_abs_diff": 1e-2, "top_1_agreement": 0.995},
    "bfloat16": {"kl_mean": 0.05, "logits_max_abs_diff": 4.0, "top_1_agreement": 0.9},
}
PROBES = (
    "What does a careful engineer check before a release, and why?",
    "Sort: 7391. What is 12 + 30, and what is 7 * 6?",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Nenne drei Gründe, warum man einem Test erst glaubt, wenn man ihn hat scheitern sehen.",
)
MAX_SHARD_SIZE = "5GB"


def main(spec: JobSpec) -> JobResult:
    """Leave the merged checkpoint with its tokenizer and certificate.json; raise if the certificate does not hold."""
    started, resting = time.monotonic(), memory("VmRSS")
    assert_base(spec)
    refuse_quantised(Path(spec.inputs["base_model"]))
    probes = probe_ids(load_tokenizer(spec))
    policy, kl_of_base = merge(spec, probes)
    gc.collect()  # PEFT's wrappers refer to each other: only this frees the merged model before the next one is loaded
    certificate = certify(Path(spec.inputs["base_model"]), Path(spec.inputs["policy"]), spec.output, spec.config["dtype"])
    logits = agreement(policy, reloaded_logits(spec, probes)) | {"kl_mean_of_base": kl_of_base}
    assert_agreement(logits, LIMITS[spec.config["dtype"]])
    certificate |= {"base_digest": spec.config["base_digest"], "logits": logits, "logits_limits": LIMITS[spec.config["dtype"]]}
    certificate |= {"versions": versions()}
    (spec.output / "certificate.json").write_text(json.dumps(certificate, indent=1))
    # beside the certificate, in manifest.json and MLflow: in it, they would make each rebuild another artifact
    cost = measured(spec.output, started, resting)
    return done(scalars(certificate | logits | cost | {"worst_weight_ratio": certificate["worst_weight"]["ratio"]}))


def merge(spec: JobSpec, probes: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """Write the merged checkpoint; return base + adapter's logits on each probe, and KL(base + adapter || base).

    One copy of the weights is in memory: the file's pages, which PEFT's sum replaces by its own. Without `safe_merge` PEFT adds
    the float32 update to the weight and rounds once, which is bit for bit a merge in float32 and a cast. With it the update is
    rounded too: 0.9 % of SmolLM2's weights were not the nearest bfloat16 (peft#1836). The certificate looks for NaN instead.
    """
    model = PeftModel.from_pretrained(load_base(spec), spec.inputs["policy"]).eval()
    policy = logits_of(model, probes)
    with model.disable_adapter():
        kl_of_base = kl_mean(policy, logits_of(model, probes))
    model.merge_and_unload().save_pretrained(str(spec.output), max_shard_size=MAX_SHARD_SIZE)
    load_tokenizer(spec).save_pretrained(str(spec.output))
    return policy, kl_of_base


def reloaded_logits(spec: JobSpec, probes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits (1, tokens, vocabulary) of what lies on disk, one tensor a probe."""
    model = AutoModelForCausalLM.from_pretrained(spec.output, dtype=getattr(torch, spec.config["dtype"]))
    return logits_of(model.eval(), probes)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, probes: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(probe).logits.float() for probe in probes]


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Return the token ids (1, tokens) of each probe, as a user's turn where the model has a chat template."""
    if not tokenizer.chat_template:
        return [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROBES]
    turns = [[{"role": "user", "content": text}] for text in PROBES]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in texts]


def agreement(policy: list[torch.Tensor], merged: list[torch.Tensor]) -> dict[str, float]:
    """Return how far the merged model's logits (1, tokens, vocabulary; one tensor a probe) are from base + adapter's."""
    both = list(zip(policy, merged, strict=True))
    return {
        "kl_mean": kl_mean(policy, merged),
        "logits_max_abs_diff": max((ours - theirs).abs().max().item() for ours, theirs in both),
        "top_1_agreement": torch.cat([(p.argmax(-1) == q.argmax(-1)).double().flatten() for p, q in both]).mean().item(),
    }


def kl_mean(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Return KL(ours || theirs) in nats per token, over all positions of all probes."""
    blocks = [pair for p, q in zip(ours, theirs, strict=True) for pair in zip(p[0].split(8), q[0].split(8), strict=True)]
    total = 0.0
    for p, q in blocks:  # a few positions at a time: a vocabulary is wide
        log_p, log_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return total / sum(len(p) for p, _ in blocks)


def assert_agreement(logits: dict[str, float], limits: dict[str, float]) -> None:
    """Raise RuntimeError if the merged model answers otherwise than base + adapter (NaN does), or rather as the base."""
    for name, limit in limits.items():
        holds = logits[name] >= limit if name == "top_1_agreement" else logits[name] <= limit
        if not holds:
            raise RuntimeError(
                f"base + adapter and the merged checkpoint, loaded again, differ on the probes: {name} is {logits[name]:.4g} "
                f"(limit {limit}). Its weights are base + (alpha / r) B A, so it is loaded or computed in another way."
            )
    if not logits["kl_mean"] < logits["kl_mean_of_base"]:
        raise RuntimeError(
            f"the merged checkpoint is as far from the policy as the base: {logits['kl_mean']:.3g} nats per token on the "
            f"probes, and {logits['kl_mean_of_base']:.3g}. What was trained is lost in rounding: set recipe.export.dtype: "
            "float32, or train further."
        )


def assert_base(spec: JobSpec) -> None:
    """Refuse an adapter that was trained on another base (LlamaFactory#6105, #3096); its bytes count, not its path.

    The digest stands for the revision too. An adapter from elsewhere has none, and says a path.
    """
    adapter = Path(spec.inputs["policy"])
    if (adapter / BASE_FILE).is_file():
        trained_on, here = json.loads((adapter / BASE_FILE).read_text())["digest"], spec.config["base_digest"]
    else:
        trained_on = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        here = spec.inputs["base_model"]
    if trained_on != here:
        raise RuntimeError(
            f"the adapter was trained on the base {trained_on!r}, and the base here is {here!r}: their sum is neither. "
            f"Merge it into its own base; if that is this one, say so in {BASE_FILE} beside the adapter, with its digest."
        )


def memory(what: str) -> int:
    """Return this process's resident memory in bytes: `VmRSS` now, `VmHWM` at its peak.

    getrusage's peak would begin with the parent's: the kernel hands it on through exec.
    """
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) * 1024


def measured(folder: Path, started: float, resting: int) -> dict[str, float]:
    """Return what the merge took: memory above what the imports held, files mapped into it included."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    peak = memory("VmHWM") - resting
    return {"peak_memory_bytes": peak, "weights_bytes": weights, "seconds": round(time.monotonic() - started, 2)}


def versions() -> dict[str, str]:
    libraries = ("peft", "transformers", "torch", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in libraries}


def scalars(certificate: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in certificate.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    run(main)
