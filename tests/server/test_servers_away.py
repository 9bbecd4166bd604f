"""Training needs neither Prefect nor MLflow while it goes on: each is killed in the middle, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from real_server import BIN, PROJECT, Server, answers, children, free_port, wait_until

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
NUM_STEPS = 400
SETTINGS = [f"recipe.sft.args.max_steps={NUM_STEPS}", "recipe.policy.args.max_steps=2", "recipe.reward_model.args.max_steps=8"]
SETTINGS += ["gates.floors={accuracy: 0.999}"]  # no such candidate: the run ends after its evaluation, as it should
GATE_FAILED = 6


@pytest.fixture(scope="module")
def tracker(server: Server) -> str:
    """An MLflow server of its own; returns its address."""
    port = free_port()
    start_mlflow(server, port)
    return f"http://127.0.0.1:{port}"


def start_mlflow(server: Server, port: int) -> subprocess.Popen:
    backend = f"sqlite:///{server.folder / 'tracker.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    command += ["--artifacts-destination", server.folder / "mlartifacts"]
    process = server.start(
        "mlflow", [*command, "--backend-store-uri", backend], {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    )
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), 90, (server.folder / "mlflow.log").read_text)
    return process


def kill(process: subprocess.Popen) -> None:
    """Kill a server under its guard, without a word to anyone; the guard then ends what is left of it."""
    os.kill(children(process.pid)[0], signal.SIGKILL)
    process.wait()


def steps_done(folder: Path) -> int:
    path = folder / "sft" / "metrics.jsonl"
    lines = path.read_text().splitlines()[:-1] if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize("away", ["prefect", "mlflow"])
def test_server_killed_while_training_costs_nothing(away, server, tracker):
    known = set((server.home / "quickstart").glob("*"))
    own = f"recipe.sft.args.learning_rate=0.00{len(known) + 10}"  # another SFT each time, on the same data
    sets = [part for setting in [*SETTINGS, own] for part in ("--set", setting)]
    output = (server.folder / f"away-{away}.log").open("w+")
    run = subprocess.Popen(
        [BIN / "posttrain", "run", "quickstart", *sets], cwd=PROJECT, env=server.env | {"MLFLOW_TRACKING_URI": tracker},
        stdout=output, stderr=output, start_new_session=True,
    )  # fmt: skip
    new = wait_until(lambda: set((server.home / "quickstart").glob("*")) - known, 120, (server.folder / "server.log").read_text)
    folder = next(iter(new))
    wait_until(lambda: steps_done(folder) >= 20, 180, Path(output.name).read_text)
    killed = server.process if away == "prefect" else next(p for p in server.processes if "mlflow" in p.args)
    kill(killed)
    gone_at = steps_done(folder)
    wait_until(lambda: steps_done(folder) > gone_at + 100, 180, Path(output.name).read_text)
    if away == "prefect":
        server.process = server.start_server()
    else:
        start_mlflow(server, int(tracker.rsplit(":", 1)[1]))
    assert run.wait(400) == GATE_FAILED, Path(output.name).read_text()
    summary = json.loads((folder / "summary.json").read_text())
    sft = next(stage for stage in summary["stages"] if stage["stage"] == "sft")
    assert curve(tracker, sft["mlflow_run_id"]) == list(range(4, NUM_STEPS + 1, 4))
    assert server.flow_run(summary["prefect_flow_run_id"])["state_name"] == "Failed"


def curve(tracker: str, run_id: str) -> list[int]:
    """Return the steps of the loss that the tracker has, asked as any client would."""
    code = "import sys, mlflow; c = mlflow.MlflowClient(sys.argv[1]); "
    code += "print(*sorted({m.step for m in c.get_metric_history(sys.argv[2], 'loss')}))"
    done = subprocess.run([sys.executable, "-c", code, tracker, run_id], capture_output=True, text=True, check=True)
    return [int(step) for step in done.stdout.split()]
