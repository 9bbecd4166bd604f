"""A run outlives the worker that started it."""

import subprocess
import sys
from pathlib import Path

SPEAKS = """
import sys, logging
import tasks.watch
from prefect.logging.handlers import PrefectConsoleHandler
sys.stdin.read()
logger = logging.getLogger("posttrain")
logger.addHandler(PrefectConsoleHandler(sys.stderr))
for number in range(3):
    logger.warning("line %d", number)
open(sys.argv[1], "w").write("went on")
"""


def test_run_whose_worker_is_gone_goes_on_without_a_reader(tmp_path: Path):
    """The pipe's other end is the worker's; rich's own answer to its end is SystemExit."""
    said = tmp_path / "said"
    process = subprocess.Popen([sys.executable, "-c", SPEAKS, said], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stderr.close()
    process.stdin.close()
    process.wait(60)
    assert said.read_text() == "went on"
