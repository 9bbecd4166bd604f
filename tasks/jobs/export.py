"""Makes the folder that plain `vllm serve` loads, checks its files, serves it, and holds its answers against the policy's.

`/health` is no proof: a server answers it with weights it failed to load. The proof is that each token of the served answers
is the one that base + adapter writes there.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from tasks.fingerprints import file_digest
from tasks.job_spec import JobResult, JobSpec
from tasks.jobs import parity, served, vllm_cpu
from tasks.jobs.answers import encoded
from tasks.jobs.job import done, run
from tasks.jobs.models import load_base, load_released, load_tokenizer, on_cpu
from tasks.jobs.training import rows

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja")
OURS = ("manifest.json", "certificate.json")  # the merge's own, not for a server
GENERATION = "generation_config.json"
SETTINGS = ("config.json", "tokenizer_config.json")
WAYS_OUT = {
    "bfloat16": "Set recipe.export.dtype: float32, or train further: a larger update rounds less.",
    "float32": "Train further: the update is as small as float32's own rounding.",
}
TEMPLATES = "additional_chat_templates"  # of a tokenizer with several


def main(spec: JobSpec) -> JobResult:
    """Leave the export and parity.json; raise if the served model does not write what the trained one writes."""
    tokenizer = load_tokenizer(spec)
    _assert_servable(spec)
    write_export(spec, tokenizer)
    check_export(spec, tokenizer)
    prompts = [row["prompt"] for _, row in zip(range(spec.config["num_probes"]), rows(spec, "rows"), strict=False)]
    refuse_long(spec, tokenizer, prompts)
    with served.serving(spec) as client:
        defaults = served.sampling_defaults(client, prompts[0])
        answers = [served.ask(client, prompt, spec.config["max_new_tokens"]) for prompt in prompts]
    probes = read_by_policy(spec, tokenizer, prompts, answers)
    summary = parity.verdict(probes, spec.config["dtype"])
    summary["failures"] += parity.other_defaults(defaults, generation_config(spec, tokenizer))
    summary["failures"] += served.lost_weights(spec.work / "vllm.log")
    proof = spec.work / "parity.json"  # kept there too: of a failed export nothing else is left
    proof.write_text(json.dumps(summary | {"probes": probes}, indent=1))
    if why := summary["failures"]:
        raise RuntimeError(
            f"the served export is not the trained policy: {why[0]} (1 of {len(why)}, all in {proof}). {whence(spec, probes)}"
        )
    shutil.copy2(proof, spec.output / "parity.json")
    metrics = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
    return done(metrics, serve=" ".join(served.flags(spec)), chat_template=parity.digest(tokenizer.chat_template))


def write_export(spec: JobSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy the merged checkpoint, and make explicit what vLLM would otherwise guess: sampling defaults and stop tokens.

    Raises RuntimeError for a file that a server has no use for, or that runs code when it is loaded.
    """
    for path in sorted(Path(spec.inputs["merge"]).iterdir()):
        if path.name in (*OURS, GENERATION, "README.md"):
            continue
        if path.name == TEMPLATES and all(file.suffix == ".jinja" for file in path.iterdir()):
            shutil.copytree(path, spec.output / path.name)
            continue
        if not any(path.match(pattern) for pattern in (*WEIGHTS, *TOKENIZER, "config.json")):
            raise RuntimeError(
                f"the merged checkpoint holds {path.name}, which is no file that vllm serve needs; it could be a pickle or "
                "code that runs when the model is loaded. Remove it from the base model's folder, or convert it to safetensors."
            )
        shutil.copy2(path, spec.output / path.name)
    for name in SETTINGS:
        forget_code(spec.output / name)
    (spec.output / GENERATION).write_text(json.dumps(generation_config(spec, tokenizer), indent=1) + "\n")
    (spec.output / "README.md").write_text(model_card(spec), encoding="utf-8")


def forget_code(file: Path) -> None:
    """Drop `auto_map`: the base was loaded by transformers' own class, and a server must not be offered the code of another."""
    settings = json.loads(file.read_text())
    if settings.pop("auto_map", None) is not None:
        file.write_text(json.dumps(settings, indent=2) + "\n")


def generation_config(spec: JobSpec, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the sampling defaults of the export.

    `temperature` is always there: vLLM knows no `do_sample`, and samples at 1.0 where nothing is said
    (vllm-project/vllm#15281). What is neutral is left out: transformers warns of it.
    """
    asked = spec.config["generation"]
    kept = {name: value for name, value in asked.items() if value is not None and value != parity.SAMPLING.get(name)}
    own = {"do_sample": asked["temperature"] > 0, "temperature": asked["temperature"]}
    return kept | own | {"eos_token_id": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}


def check_export(spec: JobSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Hold the written folder against the certified checkpoint and the trained tokenizer, before a server is started.

    Raises RuntimeError that names the file, what is there and what belongs there.
    """
    for wrong in wrong_files(spec) or wrong_words(spec, tokenizer) or wrong_settings(spec, tokenizer):
        raise RuntimeError(f"the export is not what was trained and certified: {wrong}")


def wrong_files(spec: JobSpec) -> list[str]:
    """Return how the weights differ from the certified ones, byte by byte."""
    merged = Path(spec.inputs["merge"])
    names = {path.name for folder in (merged, spec.output) for pattern in WEIGHTS for path in folder.glob(pattern)}
    wrong = []
    for name in sorted(names):
        ours, theirs = spec.output / name, merged / name
        if not ours.is_file() or not theirs.is_file():
            wrong.append(f"{name} is in {'the merged checkpoint' if theirs.is_file() else 'the export'} alone.")
        elif file_digest(ours) != file_digest(theirs):
            wrong.append(f"{name} has other bytes than in the merged checkpoint.")
    return wrong


def wrong_words(spec: JobSpec, trained: PreTrainedTokenizerBase) -> list[str]:
    """Return how the tokenizer and the chat template differ from those the policy was trained with."""
    ours, wrong = AutoTokenizer.from_pretrained(spec.output), []
    if changed := sorted(set(ours.get_vocab().items()) ^ set(trained.get_vocab().items())):
        wrong.append(f"the tokenizer has other tokens, first {changed[0]}: their embeddings were not trained.")
    if ours.chat_template != trained.chat_template:
        digests = parity.digest(ours.chat_template), parity.digest(trained.chat_template)
        wrong.append(f"the chat template is {digests[0]:.12}, the policy was trained with {digests[1]:.12}.")
    if ours.eos_token_id != trained.eos_token_id:
        wrong.append(
            f"the tokenizer ends with token {ours.eos_token_id}, the policy learned to end with {trained.eos_token_id}."
        )
    return wrong


def wrong_settings(spec: JobSpec, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return how the two configuration files differ from what was asked."""
    config = json.loads((spec.output / "config.json").read_text())
    written, wanted, wrong = json.loads((spec.output / GENERATION).read_text()), generation_config(spec, tokenizer), []
    for name in sorted(written.keys() | wanted.keys()):
        if written.get(name) != wanted.get(name):
            wrong.append(f"{GENERATION} says {name} {written.get(name)!r} where the profile says {wanted.get(name)!r}.")
    if (dtype := config.get("dtype", config.get("torch_dtype"))) != spec.config["dtype"]:
        wrong.append(f"config.json says dtype {dtype!r} where the profile asks for {spec.config['dtype']!r}.")
    for name in SETTINGS:
        if "auto_map" in json.loads((spec.output / name).read_text()):
            wrong.append(f"{name} has auto_map: loading it would run code that comes with the model.")
    return wrong


def refuse_long(spec: JobSpec, tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> None:
    """Raise RuntimeError for a probe that, with its answer, is longer than what the export is served with."""
    longest = max(len(encoded(tokenizer, [prompt])["input_ids"][0]) for prompt in prompts)
    room = spec.config["max_model_len"] - spec.config["max_new_tokens"]
    if longest > room:
        raise RuntimeError(
            f"a held-out prompt has {longest} tokens; recipe.export.max_model_len {spec.config['max_model_len']} less "
            f"recipe.export.max_new_tokens {spec.config['max_new_tokens']} leaves {room}: it could not be served. Raise "
            "max_model_len, or take longer prompts out of the eval set."
        )


def read_by_policy(
    spec: JobSpec, tokenizer: PreTrainedTokenizerBase, prompts: list[Any], answers: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return each probe: the served answer, and what base + adapter makes of each token; unpadded, for the low bits."""
    model = PeftModel.from_pretrained(load_base(spec), spec.inputs["policy"]).eval()
    probes = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            rendered = encoded(tokenizer, [prompt])["input_ids"][0].tolist()
            whole = torch.tensor([rendered + answer["ids"]])
            logits = model(whole).logits[0, len(rendered) - 1 : -1].float()
            with model.disable_adapter():
                of_base = model(whole).logits[0, len(rendered) - 1 : -1].float()
            found = parity.judged(logits, of_base, answer, [tokenizer.eos_token_id])
            probes.append({"prompt": prompt} | answer | {"rendered_ids": rendered} | found)
    return probes


def whence(spec: JobSpec, probes: list[dict[str, Any]]) -> str:
    """Return whether the server or the merge's rounding is why the served probabilities are not the policy's, and a way out."""
    model, errors, dtype = load_released(str(spec.output)).eval(), [], spec.config["dtype"]
    with torch.inference_mode():
        for probe in probes:
            prompt, answer = probe["prompt_ids"], torch.tensor(probe["ids"], dtype=torch.long)
            logits = model(torch.tensor([prompt + probe["ids"]])).logits[0, len(prompt) - 1 : -1].double()
            merged = torch.log_softmax(logits, -1).gather(-1, answer[:, None])[:, 0]
            errors += (torch.tensor(probe["logps"], dtype=torch.double) - merged).abs().tolist()
    factor = parity.mean_factor(errors)
    found = f"What is served and the merged checkpoint, read by transformers, differ by a factor of {factor:.4f}"
    if not factor < parity.mean_factor([error for probe in probes for error in probe["errors"]]):
        return f"{found}: vLLM loads or computes it in another way."
    return f"{found}: what is lost is lost by the merge's rounding to {dtype}. {WAYS_OUT[dtype]}"


def model_card(spec: JobSpec) -> str:
    """Return the export's model card: what it is, how well it does, what it was made of, and how it is served."""
    card = spec.config["card"]
    metrics = "\n".join(f"| {name} | {value:.3f} |" for name, value in card["metrics"].items())
    data = "\n".join(f"| {name} | {digest} |" for name, digest in card["lineage"].items())
    sampling = json.dumps(spec.config["generation"])
    return (
        f"---\nlicense: {card['licence'] or 'unknown'}\nbase_model: {card['base_model']}\n---\n\n# {card['profile']}\n\n"
        f"{card['description']}\n\n| held-out metric | value |\n|---|---|\n{metrics}\n\n"
        f"Served by `vllm serve DIR {' '.join(served.flags(spec))}`; sampling defaults {sampling}.\n\n"
        f"Made of, by the digests of their bytes:\n\n| | |\n|---|---|\n{data}\n\n"
        "manifest.json has the SHA-256 of every file here, and the versions of the libraries; parity.json is the proof that "
        "the served model is the trained one.\n"
    )


def _assert_servable(spec: JobSpec) -> None:
    """Say before the minute that a server's start takes what vLLM refuses."""
    config = AutoConfig.from_pretrained(spec.inputs["merge"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if on_cpu() and (why := vllm_cpu.obstacle(head_dim)):
        raise RuntimeError(f"vLLM cannot serve this model here: {why}. Export it on a GPU pool, or take another base model.")


if __name__ == "__main__":
    run(main)
