"""What every process of ours sets before a library reads it: no telemetry, and all state under one home folder."""

import os
from pathlib import Path

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
    # Our own logger's lines appear on the run's page beside Prefect's.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "posttrain",
    # A tracker that is down must cost seconds, not the four minutes of MLflow's default retries.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    # The job runner of MLflow's server quadruples its memory and serves features that we do not use.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def home() -> Path:
    """Return the folder of the store, both databases and all runs: `POSTTRAIN_HOME`, else `runs` here."""
    return Path(os.environ.get("POSTTRAIN_HOME", "runs")).resolve()


def set_defaults() -> None:
    """Set each default that the user has not set; must run before prefect or mlflow is imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "PREFECT_API_URL" not in os.environ:
        os.environ.setdefault("PREFECT_HOME", str(home() / ".prefect"))
