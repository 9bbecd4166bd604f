"""The two JSON files of the process boundary: what a job is told (job.json) and what it leaves (result.json)."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class JobSpec(BaseModel):
    """Everything a job knows: it reads no other setting, so the same spec gives the same result on any pool.

    `inputs` maps a name to a folder (or a hub id for a base model); `output` is the empty folder the job fills;
    `work` holds what is not part of the artifact: log, metrics, result; `checkpoints` outlives the run, for the next one that
    builds the same artifact. A restart after a halt begins at `first_step` with the weights of the checkpoint `start_from`.
    """

    model_config = ConfigDict(extra="forbid")

    stage: str
    module: str
    seed: int
    inputs: dict[str, str]
    config: dict[str, Any]
    drift: dict[str, Any] = {}
    output: Path
    work: Path
    checkpoints: Path
    checkpoint_seconds: float = 300
    start_from: Path | None = None
    first_step: int = 0

    @property
    def metrics_file(self) -> Path:
        return self.work / "metrics.jsonl"

    @property
    def heartbeat_file(self) -> Path:
        return self.work / "heartbeat"

    @property
    def result_file(self) -> Path:
        return self.work / "result.json"


class JobResult(BaseModel):
    """What a job left: `metrics` are final scalars, `details` whatever the stage reports beside them."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["done", "halted", "failed"]
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    error: str | None = None
    rank: int = 0
