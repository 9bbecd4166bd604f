"""What every process of ours sets before a library reads it: no telemetry, and all state under one home folder."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from tasks.errors import MachineUnfit

PROBE_BYTES = 2**20
FREE_BYTES_MIN = 256 * 2**20  # both databases, the quickstart's artifacts and its vLLM log
ANOTHER_DISK = "Free space there, or set POSTTRAIN_HOME to a folder on another disk."

HEARTBEAT_SECONDS = 30  # Prefect's smallest; its default of 180 would leave a dead run Running for nine minutes

DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "VLLM_NO_USAGE_STATS": "1",
    # The default of 20 s is too short for the embedded server's first start on a cold machine (PrefectHQ/prefect#16397).
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
    # Our own logger's lines appear on the run's page beside Prefect's.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "posttrain",
    # `plan` and `validate` log outside of any run.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # A tracker that is down must cost seconds, not the four minutes of MLflow's default retries.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # The job runner of MLflow's server quadruples its memory and serves features that we do not use.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def home() -> Path:
    """Return the folder of the store, both databases and all runs: `POSTTRAIN_HOME`, else `runs` here."""
    return Path(os.environ.get("POSTTRAIN_HOME", "runs")).resolve()


def refuse_full_disk() -> None:
    """Raise MachineUnfit if the home folder cannot be made, written or filled: databases fail on a full disk without a word."""
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home()) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(home()).free
    except OSError as error:
        raise MachineUnfit(f"{home()} cannot be written: {error.strerror or error}. {ANOTHER_DISK}") from None
    if free < FREE_BYTES_MIN:
        raise MachineUnfit(
            f"{home()} has {free / 2**20:.0f} MiB free; a run needs {FREE_BYTES_MIN / 2**20:.0f}. {ANOTHER_DISK}"
        )


def set_defaults() -> None:
    """Set each default that the user has not set; must run before prefect or mlflow is imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "PREFECT_API_URL" not in os.environ:
        os.environ.setdefault("PREFECT_HOME", str(home() / ".prefect"))
    # Prefect gives an extra logger its handler, not its level: the root's WARNING would keep the job's log off the page.
    logging.getLogger("posttrain").setLevel(logging.INFO)
