"""The `posttrain` command as a user starts it, and a job environment that is a small program."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Posttrain = Callable[..., subprocess.CompletedProcess]
COMMAND = Path(sys.executable).with_name("posttrain")


@pytest.fixture
def posttrain(home: Path, tmp_path: Path) -> Posttrain:
    """Run the command in an empty folder, with the environment changed as given."""

    def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess:
        changed = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | env
        return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, env=changed, cwd=tmp_path, timeout=120)

    return run


@pytest.fixture
def job_python(tmp_path: Path) -> Callable[..., str]:
    """Make an interpreter that answers every question about a profile with these problems, and return its path."""

    def make(*problems: str) -> str:
        answer = json.dumps({"problems": problems, "columns": {}})
        path = tmp_path / "job" / "bin" / "python"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\ncat > /dev/null\necho '{answer}'\n")
        path.chmod(0o755)
        return str(path)

    return make
