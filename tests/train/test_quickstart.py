"""The promise of the README, kept: the quickstart from nothing, what it says of itself, and every way it can stop.

One home folder serves all tests here: each further run pays only for the stages that it changes.
"""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from profiles.load import load
from profiles.schema import StagePlacement
from tasks.artifacts import Artifact
from tasks.errors import DriftHalted
from tasks.job_spec import JobSpec
from tasks.local_job import run_job
from tasks.train_policy import judge

POSTTRAIN = Path(sys.prefix) / "bin" / "posttrain"
TIGHT = ["drift.signals.kl={warn_max: 0.05, halt_max: 0.1}"]
DATA = ["validate-eval", "validate-sft", "validate-preference", "validate-prompts"]
STAGES = ["prepare", *DATA, "sft", "reward_model", "grpo", "merge", "evaluate", "export", "promote"]
pytestmark = [pytest.mark.train, pytest.mark.timeout(1200)]


class Home:
    """A home folder, and the command line on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {"POSTTRAIN_HOME": str(folder), "PREFECT_HOME": str(folder / ".prefect")}

    def run(self, profile: str, *overrides: str) -> tuple[dict, subprocess.CompletedProcess]:
        sets = [part for override in overrides for part in ("--set", override)]
        done = subprocess.run([POSTTRAIN, "run", profile, *sets, "--json"], env=self.env, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout) if done.stdout else {}, done

    def mlflow(self, query: str, *values: str) -> list[tuple]:
        with sqlite3.connect(self.folder / ".mlflow" / "mlflow.db") as database:
            return database.execute(query, values).fetchall()

    def mlflow_tags(self, summary: dict, stage: str) -> dict[str, str]:
        """The tags of a stage's run: of its own, so it has one even where the stage failed."""
        query = "select run_uuid from tags where key='mlflow.parentRunId' and value=?"
        own = [run for (run,) in self.mlflow(query, summary["mlflow_run_id"])]
        tags = [dict(self.mlflow("select key, value from tags where run_uuid=?", run)) for run in own]
        return next(found for found in tags if found["stage"] == stage)

    def prefect(self, query: str) -> list[tuple]:
        with sqlite3.connect(self.folder / ".prefect" / "prefect.db") as database:
            return database.execute(query).fetchall()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def first(home) -> dict:
    summary, done = home.run("quickstart")
    assert done.returncode == 0, done.stderr
    return summary


def statuses(summary: dict) -> dict[str, str]:
    return {stage["stage"]: stage["status"] for stage in summary["stages"]}


def policy_beats_sft_beats_base(summary: dict) -> bool:
    """No two of the three 95 % intervals overlap."""
    base, sft, policy = (summary["metrics"]["accuracy"][name] for name in ("base", "sft", "policy"))
    return base["high"] < sft["low"] and sft["high"] < policy["low"]


def test_quickstart_from_nothing_learns_and_ends_in_a_served_export(first):
    assert statuses(first) == dict.fromkeys(STAGES, "ran")
    assert (first["status"], first["exit_code"], first["gate"]["verdict"]) == ("completed", 0, "PASS")
    assert policy_beats_sft_beats_base(first)
    parity = json.loads((Path(first["export"]) / "parity.json").read_text())
    assert parity["greedy_match_ratio"] == 1.0 and parity["num_probes"] == 32
    assert (Path(first["export"]) / "model.safetensors").is_file()
    assert "<html" in (text := Path(first["report"]).read_text().lower()) or "<!doctype html>" in text


def test_quickstart_summary_on_disk_is_the_one_printed(first, home):
    on_disk = json.loads((home.folder / "quickstart" / first["run_id"] / "summary.json").read_text())
    assert on_disk == first
    for stage in first["stages"]:
        assert {"stage", "status", "fingerprint", "seconds", "artifact", "mlflow_run_id"} <= set(stage)


def test_quickstart_rollouts_came_from_vllm_and_its_weights_were_the_policys(first):
    grpo = next(stage for stage in first["stages"] if stage["stage"] == "grpo")
    manifest = json.loads((Path(grpo["artifact"]) / "manifest.json").read_text())
    assert manifest["artifact"]["details"]["rollouts"] == "vllm"
    # with a weight sync that does nothing this grows to whole nats as the policy leaves its start
    assert grpo["metrics"]["sampling/sampling_logp_difference/mean"] < 1e-3


def test_quickstart_mlflow_has_one_parent_and_one_finished_child_per_stage_with_trl_keys(first, home):
    children = home.mlflow(
        "select r.run_uuid, r.name, r.status from runs r join tags t on t.run_uuid = r.run_uuid "
        "where t.key = 'mlflow.parentRunId' and t.value = ?", first["mlflow_run_id"],
    )  # fmt: skip
    assert Counter(name for _, name, _ in children) == Counter(STAGES[:-1])  # promote starts no job
    assert {status for *_, status in children} == {"FINISHED"}
    assert home.mlflow("select status from runs where run_uuid = ?", first["mlflow_run_id"]) == [("FINISHED",)]
    grpo = next(run_id for run_id, name, _ in children if name == "grpo")
    steps = dict(home.mlflow("select key, count(*) from metrics where run_uuid = ? group by key", grpo))
    assert steps["reward"] == steps["kl"] == steps["entropy"] == 100  # max_steps, one line each: no rank wrote twice


def test_quickstart_again_trains_nothing_and_is_cached_in_prefect(first, home):
    before = home.mlflow("select count(*) from runs")[0][0]
    summary, done = home.run("quickstart")
    assert done.returncode == 0
    assert statuses(summary) == dict.fromkeys(STAGES, "cached")
    assert [s["fingerprint"] for s in summary["stages"]] == [s["fingerprint"] for s in first["stages"]]
    assert summary["metrics"] == first["metrics"] and summary["export"] == first["export"]
    assert home.mlflow("select count(*) from runs")[0][0] == before + 1  # the parent alone
    names = Counter(name for (name,) in home.prefect("select state_name from task_run order by created desc limit 12"))
    assert names == {"Cached": 12}


def test_quickstart_release_is_the_champion_and_again_nothing_is_promoted(first, home):
    """Of the runs so far the first made it; the second found it there."""
    done = subprocess.run([POSTTRAIN, "champion", "quickstart", "--json"], env=home.env, capture_output=True, text=True)
    rows = {row["alias"]: row for row in json.loads(done.stdout)}
    assert set(rows) == {"champion", "candidate"}
    assert (rows["champion"]["run"], rows["champion"]["path"]) == (first["run_id"], first["export"])
    assert first["release"]["champion"]["number"] == rows["champion"]["version"] == 1


def ask(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_champion_is_served_under_its_own_name_as_it_was_tested_and_ends_with_all_its_processes(first, home):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [POSTTRAIN, "serve", "quickstart@champion", "--follow", "--port", str(port)]
    server = subprocess.Popen(command, env=home.env, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline().startswith(f"quickstart@{Path(first['export']).name} from {first['export']}")
        assert f":{port}/v1/chat/completions" in server.stdout.readline()
        assert [m["id"] for m in ask(port, "models")["data"]] == ["quickstart", f"quickstart@{Path(first['export']).name}"]
        probe = json.loads((Path(first["export"]) / "parity.json").read_text())["probes"][0]
        said = ask(port, "chat/completions", {"model": "quickstart", "messages": probe["prompt"], "max_tokens": 12})
        assert said["choices"][0]["message"]["content"] == probe["text"]  # greedy, though nothing was said of sampling
    finally:
        server.terminate()
        server.wait(60)
    mark = f"--port {port}"
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark in read(p).replace("\0", " ")]


def read(path: Path) -> str:
    """A file of a process, which may be gone meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


def test_quickstart_damaged_artifact_is_rebuilt_and_said_so(first, home):
    merged = next(stage for stage in first["stages"] if stage["stage"] == "merge")
    weights = Path(merged["artifact"]) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    summary, done = home.run("quickstart")
    assert done.returncode == 0 and "damaged" in done.stderr
    # the merge is deterministic: its bytes are the old ones again, so the export that follows is still a hit
    assert statuses(summary) == dict.fromkeys(STAGES, "cached") | {"merge": "ran"}


def test_quickstart_plan_names_the_field_that_differs(first, home):
    command = [POSTTRAIN, "plan", "quickstart", "--set", "recipe.policy.args.beta=0.3"]
    done = subprocess.run(command, env=home.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "run" in rows["grpo"] and "recipe.policy.args.beta 0.2 → 0.3" in rows["grpo"]
    assert "cached" in rows["sft"] and "run" in rows["evaluate"]


def test_quickstart_dpo_shares_the_sft_and_learns_too(first, home):
    summary, done = home.run("quickstart-dpo")
    assert done.returncode == 0, done.stderr
    now = statuses(summary)
    assert now["sft"] == "cached" and now["dpo"] == now["export"] == "ran" and now["reward_model"] == "skipped"
    assert policy_beats_sft_beats_base(summary)


@pytest.mark.parametrize("method", ["kto", "rloo"])
def test_quickstart_by_another_method_shares_the_sft_and_learns_too(method, first, home):
    """Refused by its gate, because the export is the same for all."""
    summary, done = home.run(f"quickstart-{method}", "gates.floors={accuracy: 0.999}")
    assert done.returncode == 6, done.stderr
    now = statuses(summary)
    assert now["sft"] == "cached" and now[method] == "ran"
    assert now["reward_model"] == {"kto": "skipped", "rloo": "cached"}[method]
    assert policy_beats_sft_beats_base(summary)


def outcome(home: Home, summary: dict) -> tuple[str, str]:
    """Return what MLflow and Prefect say of a run."""
    status = home.mlflow("select status from runs where run_uuid = ?", summary["mlflow_run_id"])[0][0]
    states = dict(home.prefect("select id, state_name from flow_run"))
    return status, states[summary["prefect_flow_run_id"]]


def test_gate_failed_exits_6_and_releases_nothing(first, home):
    summary, done = home.run("quickstart", "gates.floors={accuracy: 0.999}")
    assert done.returncode == summary["exit_code"] == 6
    assert summary["gate"]["verdict"] == "FAIL" and "0.999" in summary["gate"]["claims"][0]["text"]
    assert summary["export"] is None and statuses(summary)["export"] == statuses(summary)["promote"] == "skipped"
    assert outcome(home, summary) == ("FINISHED", "Failed")


def test_drift_halted_exits_5_and_nothing_downstream_runs(first, home):
    summary, done = home.run("quickstart", "recipe.policy.args.learning_rate=0.01", *TIGHT)
    assert done.returncode == summary["exit_code"] == 5
    assert "kl" in summary["error"] and "0.1" in summary["error"]
    assert statuses(summary)["grpo"] == "failed" and statuses(summary)["evaluate"] == "skipped"
    assert outcome(home, summary) == ("FAILED", "Failed")
    assert (home.folder / "quickstart" / summary["run_id"] / "grpo" / "drift.png").is_file()
    tags = home.mlflow_tags(summary, "grpo")
    assert tags["drift.halted"] == "true" and "kl" in tags["drift.warned"]


def test_drift_settings_tightened_later_judge_the_stored_run_too(first, home):
    """Its curves are in MLflow: the policy is not trained again to be refused."""
    summary, done = home.run("quickstart", "drift.signals.kl={warn_max: 0.0001, halt_max: 0.001}")
    assert done.returncode == summary["exit_code"] == 5, done.stderr
    assert "is in the store" in summary["error"] and "0.001" in summary["error"]
    assert not (home.folder / "quickstart" / summary["run_id"] / "grpo" / "log.txt").exists()


def test_rollback_goes_on_from_the_last_good_checkpoint_and_says_so(first, home):
    """Told to stop at the gate, for the time that merge and export would take."""
    saving = ["recipe.policy.args.save_strategy=steps", "recipe.policy.args.save_steps=1", "drift.on_halt=rollback"]
    stop = ["gates.floors={accuracy: 0.999}", "recipe.policy.args.learning_rate=0.01"]
    summary, done = home.run("quickstart", *TIGHT, *saving, *stop)
    assert done.returncode == 6, done.stderr
    grpo = next(record for record in summary["stages"] if record["stage"] == "grpo")
    assert grpo["status"] == "ran" and "The policy is that of step" in grpo["notes"][-1]
    assert home.mlflow_tags(summary, "grpo")["drift.verdict"] == "rolled back"
    assert statuses(summary)["evaluate"] == "ran"


def test_run_killed_after_a_warning_is_swept_and_keeps_it(first, home):
    """SIGKILL to all of it between a warning and whatever would have come: MLflow says what is true."""
    warn = ["recipe.policy.args.learning_rate=0.00012", "drift.signals.kl={warn_max: 0.000001, halt_max: 9.0}"]
    sets = [part for override in warn for part in ("--set", override)]
    runs = home.folder / "quickstart"
    known = set(runs.iterdir())
    process = subprocess.Popen([POSTTRAIN, "run", "quickstart", *sets], env=home.env, start_new_session=True)

    def warned() -> bool:
        files = [path / "grpo" / "metrics.jsonl" for path in set(runs.iterdir()) - known]
        return any(file.is_file() and '"severity": "warn"' in file.read_text() for file in files)

    end = time.monotonic() + 300
    while not warned():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)
    time.sleep(4)  # the pipeline hands findings over once a second
    folder = max(set(runs.iterdir()) - known)
    os.kill(json.loads((folder / "process.json").read_text())["pid"], signal.SIGKILL)
    assert process.wait(timeout=60) != 0  # the command that started it ends what is left, and sweeps
    stage = home.mlflow(
        "select run_uuid, status from runs where run_uuid in (select run_uuid from tags where key='run_id' and value=?) "
        "and run_uuid in (select run_uuid from tags where key='stage' and value='grpo')", folder.name,
    )  # fmt: skip
    assert [status for _, status in stage] == ["FAILED"]
    assert dict(home.mlflow("select key, value from tags where run_uuid=?", stage[0][0]))["drift.warned"] == "kl"


def test_contract_broken_exits_3_before_any_training(first, home, tmp_path):
    rows = [{"prompt": f"Sort: {i}21", "completion": "" if i == 3 else f"12{i}"} for i in range(20)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary, done = home.run("quickstart", "recipe.datasets.sft.prepared=null", f"recipe.datasets.sft.path={data}")
    assert done.returncode == summary["exit_code"] == 3
    assert statuses(summary)["validate-sft"] == "failed" and statuses(summary)["sft"] == "skipped"
    assert outcome(home, summary) == ("FAILED", "Failed")


def test_job_failed_exits_4_with_the_root_cause_and_no_half_artifact(first, home):
    summary, done = home.run("quickstart", "recipe.export.max_model_len=16")  # no held-out prompt fits in 16 less 12
    assert done.returncode == summary["exit_code"] == 4
    assert "rank 0" in summary["error"] and "Log: " in summary["error"]
    exports = home.folder / ".store" / "export"
    assert {path.name for path in exports.iterdir()} == {Path(first["export"]).name, *dpo_exports(home)}
    assert outcome(home, summary) == ("FAILED", "Failed")


def dpo_exports(home: Home) -> set[str]:
    summaries = [json.loads(path.read_text()) for path in (home.folder / "quickstart-dpo").glob("*/summary.json")]
    return {Path(summary["export"]).name for summary in summaries if summary["export"]}


def test_interrupt_in_training_exits_130_leaves_no_process_and_the_next_run_goes_on(first, home):
    """Ctrl-C, as the terminal sends it: to every process of the foreground group."""
    command = [POSTTRAIN, "run", "quickstart", "--set", "recipe.policy.args.learning_rate=0.0001", "--json"]
    process = subprocess.Popen(
        command, env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    runs = home.folder / "quickstart"
    known = set(runs.iterdir())
    end = time.monotonic() + 300
    while not any((path / "grpo" / "metrics.jsonl").is_file() for path in set(runs.iterdir()) - known):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    summary = json.loads(output)
    assert (summary["status"], summary["exit_code"]) == ("cancelled", 130)
    assert outcome(home, summary) == ("KILLED", "Cancelled")
    left = subprocess.run(["pgrep", "-f", str(home.folder)], capture_output=True, text=True).stdout.split()
    assert not left


def artifact(summary: dict, stage: str) -> str:
    return next(record["artifact"] for record in summary["stages"] if record["stage"] == stage)


def test_two_processes_log_each_step_once_and_leave_one_adapter(first, tmp_path):
    """Equal work: 2 ranks x batch 16 see the rows of 1 x 32, so the first loss is the mean of both ranks' and finite."""
    output, work = tmp_path / "output", tmp_path / "work"
    output.mkdir()
    work.mkdir()
    args = {"max_steps": 4, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "gradient_checkpointing": False}
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "use_rslora": False}
    spec = JobSpec(
        stage="sft", module="tasks.jobs.sft", seed=1, output=output, work=work, checkpoints=work / "checkpoints",
        inputs={"base_model": f"{artifact(first, 'prepare')}/base_model", "rows": artifact(first, "validate-sft")},
        config={"dtype": "float32", "base_digest": "quickstart", "lora": lora, "args": args},
    )  # fmt: skip
    seen: list[dict] = []
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = run_job(spec, StagePlacement(accelerate="cpu_ddp_2", env=environment), seen.extend, threading.Event())
    assert [line["step"] for line in seen if "loss" in line["metrics"]] == [1, 2, 3, 4]
    assert result.status == "done" and (output / "adapter_model.safetensors").is_file()
    assert "world size 2" in (work / "log.txt").read_text()


def test_two_processes_halt_at_the_same_step(first, tmp_path):
    """KL above 1e-9 from the second step on: with patience 2 both ranks leave at the third log step at the latest."""
    output, work = tmp_path / "output", tmp_path / "work"
    output.mkdir()
    work.mkdir()
    policy = load("quickstart").recipe.policy.model_dump(exclude={"method"})
    args = policy["args"] | {"max_steps": 30, "per_device_train_batch_size": 16, "beta": 0.0}
    config = policy | {"args": args, "rollouts": "transformers", "reward_functions": [{"name": "near_answer", "weight": 1.0}]}
    tight = load("quickstart", ["drift.signals.kl={warn_max: 1e-10, halt_max: 1e-9, patience: 2}"])
    drift = judge(tight, Artifact("dataset", artifact(first, "validate-eval"), "a" * 12, "rows"))
    spec = JobSpec(
        stage="grpo", module="tasks.jobs.grpo", seed=1, output=output, work=work, checkpoints=work / "checkpoints", drift=drift,
        inputs={
            "base_model": f"{artifact(first, 'prepare')}/base_model", "sft": artifact(first, "sft"),
            "rows": artifact(first, "validate-prompts"), "canaries": artifact(first, "validate-eval"),
        },
        config={"dtype": "float32", "base_digest": "quickstart"} | config,
    )  # fmt: skip
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with pytest.raises(DriftHalted, match="kl averaged"):
        run_job(spec, StagePlacement(accelerate="cpu_ddp_2", env=environment), lambda lines: None, threading.Event())
    halts = re.findall(r"grpo: rank (\d) halts at step (\d+)", (work / "log.txt").read_text())
    assert sorted(rank for rank, _ in halts) == ["0", "1"] and len({step for _, step in halts}) == 1
    assert not list(work.glob("failure.*")) and not list(output.iterdir())
