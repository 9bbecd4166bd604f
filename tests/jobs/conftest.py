"""Tiny real artifacts, made once, for the tests of the job side; they run in the job environment."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_recipe import LORA, TRAIN

from tasks.job_spec import JobSpec

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """The quickstart's base model and rows, small, and the rows as the validated datasets that jobs read."""
    from tasks.jobs.make_quickstart import make

    output = tmp_path_factory.mktemp("made")
    make(output, 1, {"num_sft": 128, "num_preference": 128, "num_prompts": 64, "num_eval": 24, "pretrain_steps": 30})
    for path in output.glob("*.jsonl"):
        folder = output / path.stem
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist([json.loads(line) for line in path.open()]), folder / "rows.parquet")
    return output


@pytest.fixture
def spec(made, tmp_path):
    """A function that makes a stage's JobSpec on the tiny model, with its own output and work folders."""

    def make_spec(stage: str, rows: str | None = None, inputs: dict[str, str] | None = None, **config: Any) -> JobSpec:
        given = {"base_model": str(made / "base_model")} | ({"rows": str(made / rows)} if rows else {}) | (inputs or {})
        output, work = tmp_path / stage / "output", tmp_path / stage / "work"
        output.mkdir(parents=True)
        work.mkdir()
        config = {"dtype": "float32", "base_digest": "tiny"} | config
        return JobSpec(
            stage=stage,
            module=f"tasks.jobs.{stage}",
            seed=1,
            inputs=given,
            config=config,
            output=output,
            work=work,
            checkpoints=work / "checkpoints",
        )

    return make_spec


@pytest.fixture(scope="session")
def sft_adapter(made, tmp_path_factory) -> str:
    """An SFT adapter that really trained for a few steps."""
    from tasks.jobs import sft

    folder = tmp_path_factory.mktemp("sft")
    (folder / "output").mkdir()
    inputs = {"base_model": str(made / "base_model"), "rows": str(made / "sft")}
    config = {"dtype": "float32", "base_digest": "tiny", "lora": LORA, "args": TRAIN | {"learning_rate": 5e-3}}
    sft.main(
        JobSpec(
            stage="sft",
            module="tasks.jobs.sft",
            seed=1,
            inputs=inputs,
            config=config,
            output=folder / "output",
            work=folder,
            checkpoints=folder / "checkpoints",
        )
    )
    return str(folder / "output")
