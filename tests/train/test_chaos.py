"""A few kills of what docs/reliability.md records: random processes of a pipeline's tree, random signals, random times."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
KILLS = 3


@pytest.mark.chaos
@pytest.mark.timeout(1100)
def test_killed_again_and_again_the_run_ends_with_the_same_bytes_and_leaves_nothing_behind():
    command = [sys.executable, "benchmarks/chaos.py", "--kills", str(KILLS), "--seed", "4", "--seconds", "25"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"(\d+) kills in (\d+) rounds, 0 findings", done.stdout)
    assert said and int(said[1]) == KILLS, done.stdout
