"""How an export is served: one command line and one environment, for the parity test and for `posttrain serve` alike."""

from collections.abc import Mapping
from pathlib import Path

LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_",
    "TORCHELASTIC_",
)
HOST = "127.0.0.1"


def server_command(python: Path | str, export: Path, names: list[str], port: int, flags: list[str]) -> list[str]:
    """Return the command that serves an export under `names` on 127.0.0.1; `flags` are those of its parity test.

    Not the console script `vllm`: it looks its distribution's name up, and the CPU build has another one.
    """
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(export)]
    return [*command, "--served-model-name", *names, "--host", HOST, "--port", str(port), *flags]


def server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for vLLM: no telemetry, and nothing of a launcher, whose ranks it would take for its own.

    Its log is read after the parity test: a level that hides what it says of weights would make that reading worthless.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith(LAUNCHERS)}
    return (
        {"VLLM_CPU_KVCACHE_SPACE": "1"} | kept | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    )
