"""Makes the folder that plain `vllm serve` loads, serves it on 127.0.0.1, and holds its answers against the policy's.

`/health` is no proof: a server answers it with weights it failed to load. The proof is the same greedy text for the same
rendered prompts from base + adapter in transformers and from the served export.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from peft import PeftModel
from transformers import GenerationConfig

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs.answers import generate
from tasks.jobs.job import done, run
from tasks.jobs.models import load_base, load_tokenizer, on_cpu
from tasks.jobs.training import rows

MATCH_MIN = {"float32": 1.0, "bfloat16": 0.75}  # bfloat16 logits tie, and the two engines break ties differently


def main(spec: JobSpec) -> JobResult:
    """Leave the export and parity.json; raise if the served model does not write what the trained one writes."""
    write_export(spec)
    with serving(spec) as client:
        prompts = [row["prompt"] for _, row in zip(range(spec.config["num_probes"]), rows(spec, "rows"), strict=False)]
        served = [ask(client, prompt, spec) for prompt in prompts]
    trained = policy_answers(spec, prompts)
    matches = [s == t for s, t in zip(served, trained, strict=True)]
    parity = {"greedy_match_ratio": sum(matches) / len(matches), "num_probes": len(matches)}
    samples = [{"prompt": p, "trained": t, "served": s} for p, t, s in zip(prompts, trained, served, strict=True)]
    (spec.output / "parity.json").write_text(json.dumps(parity | {"samples": samples}, indent=1))
    limit = MATCH_MIN[spec.config["dtype"]]
    if parity["greedy_match_ratio"] < limit:
        first = samples[matches.index(False)]
        raise RuntimeError(
            f"the served export is not the trained policy: {parity['greedy_match_ratio']:.2f} of the probes agree "
            f"(limit {limit}). First difference: {first}"
        )
    serve = f"--dtype {spec.config['dtype']} --max-model-len {spec.config['max_model_len']}"
    return done({name: float(value) for name, value in parity.items()}, samples=samples[:3], serve=serve)


def write_export(spec: JobSpec) -> None:
    """Copy the merged checkpoint and make explicit what vLLM would otherwise guess: sampling defaults and stop tokens."""
    merged = Path(spec.inputs["merge"])
    for path in merged.iterdir():
        if path.name not in ("manifest.json", "certificate.json"):
            shutil.copy2(path, spec.output / path.name)
    tokenizer = load_tokenizer(spec)
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    generation.save_pretrained(str(spec.output))
    (spec.output / "README.md").write_text(model_card(spec))


def model_card(spec: JobSpec) -> str:
    """Return the export's model card."""
    card = spec.config["card"]
    accuracy = "\n".join(f"| {name} | {value:.3f} |" for name, value in card["metrics"].items())
    return (
        f"---\nlicense: {card['licence'] or 'unknown'}\nbase_model: {card['base_model']}\n---\n\n# {card['profile']}\n\n"
        f"{card['description']}\n\n| held-out metric | value |\n|---|---|\n{accuracy}\n\n"
        f"Served by `vllm serve DIR --dtype {spec.config['dtype']} --max-model-len {spec.config['max_model_len']}`; "
        "lineage in manifest.json.\n"
    )


@contextmanager
def serving(spec: JobSpec) -> Iterator[OpenAI]:
    """Yield a client of `vllm serve` on the export; the server and all its processes are gone afterwards."""
    port = free_port()
    log = spec.work / "vllm.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            serve_command(spec, port), stdout=file, stderr=subprocess.STDOUT, env=serve_environment(), start_new_session=True
        )
    try:
        wait_until_ready(process, port, spec.config["startup_timeout_seconds"], log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        stop(process)


def serve_command(spec: JobSpec, port: int) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(spec.output)]
    command += ["--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(spec.config["max_model_len"]), "--dtype", spec.config["dtype"]]
    return [*command, "--enforce-eager"] if on_cpu() else command


def serve_environment() -> dict[str, str]:
    """Return our environment without the launcher's: vLLM would take its ranks and addresses for its own."""
    ours = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ACCELERATE_",
        "TORCHELASTIC_",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **kept}


def wait_until_ready(process: subprocess.Popen, port: int, timeout_seconds: int, log: Path) -> None:
    """Return when the server answers; raise with the end of its log if it exits or takes too long."""
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
    what = f"did not answer within {timeout_seconds} s" if process.poll() is None else f"exited with {process.returncode}"
    raise RuntimeError(f"vllm serve {what}. The end of {log}:\n{tail}")


def stop(process: subprocess.Popen) -> None:
    """End the server's whole process group: its engine outlives the API process otherwise (vllm-project/vllm#34643)."""
    for number, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(client: OpenAI, prompt: str | list[dict[str, Any]], spec: JobSpec) -> str:
    """Return the served model's greedy answer, through the chat API for conversational prompts."""
    common = {"model": "policy", "temperature": 0.0, "max_tokens": spec.config["max_new_tokens"]}
    if isinstance(prompt, str):
        return client.completions.create(prompt=prompt, **common).choices[0].text
    return client.chat.completions.create(messages=prompt, **common).choices[0].message.content or ""


def policy_answers(spec: JobSpec, prompts: list[Any]) -> list[str]:
    """Return what base + adapter writes to the same prompts in transformers, one at a time: padding moves low bits."""
    tokenizer = load_tokenizer(spec)
    model = PeftModel.from_pretrained(load_base(spec), spec.inputs["policy"]).eval()
    with torch.inference_mode():
        return [generate(model, tokenizer, [p], spec.config["max_new_tokens"])[0] for p in prompts]


if __name__ == "__main__":
    run(main)
