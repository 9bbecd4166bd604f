"""Serves an export with vLLM on 127.0.0.1 as `posttrain serve` does, and asks it."""

import os
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

from openai import OpenAI

from tasks.job_spec import JobSpec
from tasks.jobs.models import on_cpu
from tasks.vllm_server import server_command, server_environment

NAME = "policy"
LOST_WEIGHTS = ("not initialized from", "not found in params_dict")  # vLLM's lines on weights that it lacks or ignores


@contextmanager
def serving(spec: JobSpec) -> Iterator[OpenAI]:
    """Yield a client of `vllm serve` on the export; the server and all its processes are gone afterwards."""
    port = free_port()
    log = spec.work / "vllm.log"
    command = server_command(sys.executable, spec.output, [NAME], port, flags(spec))
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=server_environment(os.environ), start_new_session=True
        )
    try:
        wait_until_ready(process, port, spec.config["startup_timeout_seconds"], log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        stop(process)


def flags(spec: JobSpec) -> list[str]:
    """Return vLLM's flags for this export: what was tested is what `posttrain serve` starts."""
    own = ["--dtype", spec.config["dtype"], "--max-model-len", str(spec.config["max_model_len"])]
    return [*own, "--enforce-eager"] if on_cpu() else own


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


def ask(client: OpenAI, prompt: str | list[dict[str, Any]], max_new_tokens: int) -> dict[str, Any]:
    """Return the greedy answer `{"prompt_ids", "ids", "logps", "finish", "text"}`, by the chat API for conversations.

    What the export samples with by default is switched off: it is the weights that are asked.
    """
    common: dict[str, Any] = {"model": NAME, "temperature": 0.0, "top_p": 1.0, "max_tokens": max_new_tokens}
    common["extra_body"] = {"return_token_ids": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    if isinstance(prompt, str):
        choice = client.completions.create(prompt=prompt, logprobs=0, **common).choices[0]
        prompt_ids, text, logps = choice.prompt_token_ids, choice.text, choice.logprobs.token_logprobs
    else:
        answer = client.chat.completions.create(messages=prompt, logprobs=True, **common)
        choice = answer.choices[0]
        prompt_ids, text = answer.prompt_token_ids, choice.message.content or ""
        logps = [token.logprob for token in choice.logprobs.content]
    finish = choice.finish_reason
    return {"prompt_ids": prompt_ids, "ids": choice.token_ids, "logps": logps, "finish": finish, "text": text}


def sampling_defaults(client: OpenAI, prompt: str | list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sampling parameters that the server takes for a request that names none."""
    kind, body = ("completions", {"prompt": prompt}) if isinstance(prompt, str) else ("chat/completions", {"messages": prompt})
    answer = client.post(f"/{kind}/render", body={"model": NAME} | body, cast_to=object)
    return (answer[0] if isinstance(answer, list) else answer)["sampling_params"]


def lost_weights(log: Path) -> list[str]:
    """Return vLLM's lines on weights that it did not find: it serves noise in their place (vllm-project/vllm#5148)."""
    return [line for line in log.read_text(errors="replace").splitlines() if any(sign in line for sign in LOST_WEIGHTS)]
