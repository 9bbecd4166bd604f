"""Which export `posttrain serve` finds, and that it serves none whose files are not those that were tested."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.serving import example, find_export, serve
from profiles.load import load
from tasks.artifacts import Artifact
from tasks.errors import MachineUnfit, ProfileError
from tasks.monitoring import mlflow_runs, registry
from tasks.pipeline_run import store
from tasks.served_model import models_at

PROJECT = Path(__file__).resolve().parents[2]
FLAGS = "--dtype float32 --max-model-len 64"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def exported(key: str, seconds: int = 9) -> Path:
    """An export in the store, as its job leaves it; its server may take so long to start."""
    identity = {"recipe": {"card": {"profile": "quickstart"}, "startup_timeout_seconds": seconds}}
    with store().staging("export", key) as staged:
        (staged / "model.safetensors").write_text(key)
        (staged / "tokenizer_config.json").write_text("{}")
        made = store().commit(staged, Artifact("export", "", key, "", details={"serve": FLAGS}), identity)
    return Path(made.path)


def ran(home: Path, run_id: str, key: str | None, exit_code: int = 0) -> None:
    """A finished run's folder, of one that came to this export."""
    folder = home / "quickstart" / run_id
    folder.mkdir(parents=True)
    stages = [{"stage": "export", "fingerprint": key}] if key else []
    summary = {"profile": "quickstart", "export": key, "exit_code": exit_code, "stages": stages}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "profile.json").write_text(load("quickstart").model_dump_json())


def test_newest_finished_run_of_a_profile_a_run_and_a_folder_name_their_export(home):
    for number, key in enumerate(("a", "b")):
        folder = exported(key)
        ran(home, f"2026010{number}", key)
    ran(home, "20260102", None)  # stopped before its export
    ran(home, "20260103", "b", exit_code=7)
    assert find_export("quickstart").fingerprint == "b"
    assert find_export("20260100").names == ["quickstart", "quickstart@a"]
    found = find_export(str(folder))
    assert (found.fingerprint, found.flags, found.startup_timeout_seconds) == ("b", FLAGS.split(), 9)
    assert "/v1/completions" in example(found, 8000)


@pytest.mark.parametrize("what", ["nobody", "20260102", "nobody@champion", "/tmp"])
def test_what_names_no_export_is_refused(home, what):
    ran(home, "20260102", None)
    with pytest.raises(ProfileError):
        find_export(what)


def test_altered_export_is_not_served(home):
    (exported("a") / "model.safetensors").write_text("A")
    ran(home, "20260100", "a")
    with pytest.raises(MachineUnfit, match="not the export that was tested"):
        find_export("quickstart")


def test_only_a_champion_can_be_followed(home):
    with pytest.raises(ProfileError, match="never changes"):
        serve("quickstart", 8000, follow=True)


STAND_IN = """#!{python} -S
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
names = sys.argv[sys.argv.index("--served-model-name") + 1 : sys.argv.index("--host")]
if "broken" in names[1]:
    sys.exit("these weights do not load")
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"data": [{{"id": name}} for name in names]}}).encode())
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def followed(home, tmp_path, monkeypatch):
    """`posttrain serve quickstart@champion --follow`, with a small program in vLLM's place; and how to make a champion."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setenv("POSTTRAIN_JOB_PYTHON", str(python))
    started = []

    def release(key: str) -> registry.Version:
        exported(key, seconds=60)
        ran(home, f"run-{key}", key)
        run_id = mlflow_runs.open_run("quickstart", key, {})
        tags = {"policy.stage": "grpo", "policy.fingerprint": key, "run_id": f"run-{key}"}
        version = registry.register("quickstart", store().find("export", key), run_id, tags)
        registry.point(version, registry.CHAMPION)
        return version

    def follow() -> tuple[subprocess.Popen, int]:
        port = free_port()
        command = [sys.executable, "-P", "-m", "flows.cli", "serve", "quickstart@champion", "--follow", "--port", str(port)]
        process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process, port

    yield release, follow
    for process in started:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def wait_for(port: int, name: str) -> None:
    end = time.monotonic() + 60
    while models_at(f"http://127.0.0.1:{port}") != ["quickstart", name]:
        assert time.monotonic() < end, models_at(f"http://127.0.0.1:{port}")
        time.sleep(0.2)


@pytest.mark.timeout(240)
def test_new_champion_takes_the_place_of_the_old_one_and_a_bad_one_does_not(home, followed):
    release, follow = followed
    release("a")
    process, port = follow()
    wait_for(port, "quickstart@a")
    release("b")
    wait_for(port, "quickstart@b")
    release("damaged")
    (store().place("export", "damaged") / "model.safetensors").write_text("x")
    release("broken")
    time.sleep(12)  # two looks at the registry, and a start that fails
    wait_for(port, "quickstart@b")
    assert process.poll() is None
    release("c")
    wait_for(port, "quickstart@c")


@pytest.mark.timeout(240)
def test_server_goes_on_while_the_registry_does_not_answer(home, followed):
    release, follow = followed
    release("a")
    process, port = follow()
    wait_for(port, "quickstart@a")
    (home / ".mlflow").rename(home / "away")
    time.sleep(7)
    wait_for(port, "quickstart@a")
    assert process.poll() is None


def test_older_runs_placement_is_read_though_the_rest_of_its_profile_is_not_known_any_more(home):
    exported("a")
    ran(home, "20260100", "a")
    file = home / "quickstart" / "20260100" / "profile.json"
    old = json.loads(file.read_text())
    old["gates"]["accuracy_min"] = 0.5
    old["placement"]["export"] = {"env": {"OMP_NUM_THREADS": "7"}}
    file.write_text(json.dumps(old))
    assert find_export("20260100").placement.env["OMP_NUM_THREADS"] == "7"


def test_folder_of_something_else_is_no_export(home, tmp_path):
    with store().staging("base_model", "m") as staged:
        (staged / "config.json").write_text("{}")
        made = store().commit(staged, Artifact("base_model", "", "m", ""), {"digest": "x"})
    with pytest.raises(ProfileError, match="holds a base_model"):
        find_export(made.path)
