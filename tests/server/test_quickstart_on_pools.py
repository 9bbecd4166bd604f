"""The quickstart on two tagged work pools of a real server, with real workers, and a bucket between two machines.

The worker of `left` shares the run's disk; that of `right` has a home folder of its own, and with the run only the bucket.
"""

import json
import re
import sqlite3
from pathlib import Path

import pytest
import yaml
from real_server import PROJECT, Server, is_alive, wait_until

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
# Small: what is tested is where the stages run and what becomes known of them, not what they learn.
SMALL = ["recipe.sft.args.max_steps=60", "recipe.reward_model.args.max_steps=40", "recipe.policy.args.max_steps=2"]
SMALL += ["gates.better_than=[]", "recipe.export.num_probes=2"]
PLACED = ["placement.default.tags=[cpu]", "placement.sft.tags=[cpu, left]", "placement.reward_model.tags=[right, cpu]"]
ON_POOLS = ["sft", "reward_model", "grpo", "evaluate", "merge", "export", "prepare"]


@pytest.fixture(scope="module")
def pools(server: Server, s3: dict[str, str], tmp_path_factory) -> Server:
    """Two pools, `left` and `right`, each with a slot and a worker, beside the shipped orchestrator."""
    import s3fs

    client = {"key": s3["AWS_ACCESS_KEY_ID"], "secret": s3["AWS_SECRET_ACCESS_KEY"], "endpoint_url": s3["AWS_ENDPOINT_URL"]}
    s3fs.S3FileSystem(**client).mkdir("artifacts")
    server.env |= s3 | {"POSTTRAIN_STORE": "s3://artifacts/posttrain"}
    content = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    variables = {"working_dir": str(PROJECT), "env": content["definitions"]["variables"]["env"]}
    slot = {"type": "process", "concurrency_limit": 1}
    content["definitions"] = {"pools": {"left": slot, "right": slot, "away": slot}}
    job = {"entrypoint": "flows.accelerate_job.accelerate_job"}
    content["deployments"] = [
        job | {"name": name, "tags": ["cpu", name], "work_pool": {"name": name, "job_variables": variables}}
        for name in ("left", "right", "away")
    ]
    folder = tmp_path_factory.mktemp("pools")
    (folder / "prefect.yaml").write_text(yaml.safe_dump(content))
    assert server.posttrain("pools", "--file", str(folder / "prefect.yaml")).returncode == 0
    server.prefect("deploy", "--all", cwd=folder)
    for pool, home in (("orchestrator", server.home), ("left", server.home), ("right", server.folder / "machine")):
        server.worker(pool, POSTTRAIN_HOME=str(home))
    return server


def run(server: Server, *overrides: str, deployment: str = "ci") -> tuple[int, dict, str]:
    """Run the quickstart through a deployment; return the exit code, its summary and what was printed."""
    sets = [part for override in [*SMALL, *overrides] for part in ("--set", override)]
    done = server.posttrain("run", "quickstart", "--deployment", deployment, "--wait", *sets)
    summaries = sorted((server.home / "quickstart").glob("*/summary.json"))
    return done.returncode, json.loads(summaries[-1].read_text()) if summaries else {}, done.stdout + done.stderr


@pytest.fixture(scope="module")
def first(pools: Server) -> dict:
    code, summary, said = run(pools, *PLACED)
    assert code == 0, said
    return summary


def pool_of(server: Server) -> dict[str, str]:
    """Return the pool of each stage's newest job."""
    runs = server.flow_runs()
    return {run["name"].rsplit("-", 1)[0]: run["work_pool_name"] for run in runs if run["work_pool_name"] != "orchestrator"}


def test_stages_land_on_the_pool_that_has_all_their_tags(first, pools):
    used = pool_of(pools)
    assert (used["sft"], used["reward_model"]) == ("left", "right")
    assert set(used) == set(ON_POOLS) and set(used.values()) == {"left", "right"}  # `away` has no worker


def test_summary_is_complete_and_the_export_is_in_the_common_store(first, pools):
    assert {stage["status"] for stage in first["stages"]} == {"ran"}
    assert (Path(first["export"]) / "model.safetensors").is_file() and Path(first["export"]).is_relative_to(pools.home)


def test_stages_that_do_not_depend_on_each_other_run_at_the_same_time(first, pools):
    times = {}
    for flow_run in pools.flow_runs():
        times[flow_run["name"].rsplit("-", 1)[0]] = (flow_run["start_time"], flow_run["end_time"])
    (sft_start, sft_end), (rm_start, rm_end) = times["sft"], times["reward_model"]
    assert max(sft_start, rm_start) < min(sft_end, rm_end)


@pytest.mark.parametrize(("name", "last"), [("sft", 60), ("reward_model", 40)])
def test_curves_of_a_job_on_a_pool_are_in_mlflow(name, last, first, pools):
    """On this machine, and on another one, from where they come through the bucket."""
    stage = next(stage for stage in first["stages"] if stage["stage"] == name)
    with sqlite3.connect(pools.home / ".mlflow" / "mlflow.db") as database:
        query = "select step from metrics where run_uuid = ? and key = 'loss' order by step"
        steps = [step for (step,) in database.execute(query, [stage["mlflow_run_id"]])]
    assert steps == list(range(4, last + 1, 4))  # the profile logs every fourth


def test_other_machine_has_its_job_and_its_inputs_and_no_more(first, pools):
    other = pools.folder / "machine"
    assert {path.name for path in other.glob("quickstart/*/*")} & {"sft", "reward_model"} == {"reward_model"}
    assert (Path(first["report"]).parent / "reward_model" / "log.txt").is_file()  # brought to the run's own folder
    assert not (other / ".mlflow").exists()


def test_job_is_a_subflow_of_the_run_with_its_tags_and_its_log(first, pools):
    (sft,) = pools.flow_runs("sft-")
    assert {"cpu", "left", "stage:sft"} <= set(sft["tags"])
    parent = pools.api(f"/task_runs/{sft['parent_task_run_id']}")
    assert parent["flow_run_id"] == first["prefect_flow_run_id"]
    lines = pools.api("/logs/filter", {"logs": {"flow_run_id": {"any_": [sft["id"]]}}, "limit": 200})
    assert any("world size 1" in line["message"] for line in lines)


def test_nightly_run_sends_nothing_to_any_pool_while_its_rows_are_the_same_and_trains_on_a_new_one(first, pools, tmp_path):
    prepared = Path(next(stage["artifact"] for stage in first["stages"] if stage["stage"] == "prepare"))
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((prepared / "prompts.jsonl").read_bytes())
    data = f"recipe.datasets.prompts={{path: {rows}, kind: prompt_only}}"
    before = len(pools.flow_runs())
    code, same, said = run(pools, *PLACED, data, deployment="nightly")
    assert code == 0, said
    assert {stage["status"] for stage in same["stages"]} == {"cached"}
    assert len(pools.flow_runs()) == before + 1
    tasks = pools.api("/task_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 12})
    assert {task["state"]["name"] for task in tasks} == {"Cached"}
    with rows.open("a") as file:
        file.write('{"prompt": [{"role": "user", "content": "Sort: 90817263"}], "answer": "01236789"}\n')
    # the gate that nobody passes ends it before merge and export
    code, changed, said = run(pools, *PLACED, data, "gates.floors={accuracy: 0.999}", deployment="nightly")
    status = {stage["stage"]: stage["status"] for stage in changed["stages"]}
    assert code == 6, said
    assert (status["sft"], status["validate-prompts"], status["grpo"], status["evaluate"]) == ("cached", "ran", "ran", "ran")


def test_same_recipe_placed_here_is_the_same_artifact(first, pools):
    code, summary, said = run(pools)
    assert code == 0, said
    assert {stage["status"] for stage in summary["stages"]} == {"cached"}


def test_failing_job_on_a_pool_exits_with_its_own_code_and_cause_everywhere(first, pools):
    code, summary, said = run(pools, *PLACED, "recipe.sft.args.learning_rate=0.0")
    assert code == summary["exit_code"] == 4
    assert "on pool" in summary["error"] and "rank 0" in summary["error"] and summary["error"].splitlines()[-1] in said
    assert pools.flow_run(summary["prefect_flow_run_id"])["state_name"] == "Failed"
    assert pools.flow_runs("sft-")[-1]["state_name"] == "Failed"


def test_worker_with_another_store_is_refused_before_it_trains(first, pools, tmp_path):
    worker = pools.worker("away", POSTTRAIN_HOME=str(tmp_path / "elsewhere"), POSTTRAIN_STORE="")
    override = ["placement.default.tags=[away]", "recipe.sft.args.learning_rate=0.0013"]
    code, summary, _ = run(pools, *override)
    worker.stdin.close()
    worker.wait()
    assert code == 4 and "POSTTRAIN_STORE" in summary["error"]
    assert not list((tmp_path / "elsewhere").glob("quickstart/*/sft/metrics.jsonl"))


ASKED = [*PLACED, "gates.approval=true"]


def start_and_wait_for_the_question(server: Server) -> dict:
    """Start a run that asks, and return it once it is suspended and its process is gone."""
    sets = [part for override in [*SMALL, *ASKED] for part in ("--set", override)]
    started = server.posttrain("run", "quickstart", "--deployment", "manual", *sets)
    assert started.returncode == 0, started.stderr
    (name,) = re.findall(r"runs/flow-run/(\S+)", started.stdout)
    wait_until(lambda: server.flow_run(name)["state_name"] == "Suspended", 120, lambda: server.flow_run(name))
    processes = [path.parent / "process.json" for path in server.home.glob("quickstart/*/waiting")]
    (file,) = [file for file in processes if name in file.read_text()]
    process = json.loads(file.read_text())
    wait_until(lambda: not is_alive(process["pid"]), 30)
    return {"id": name, "folder": file.parent} | process


def answer(server: Server, flow_run_id: str, **given: str) -> dict:
    """Answer the form as the page does, and return the run at its end."""
    assert server.api(f"/flow_runs/{flow_run_id}/resume", {"run_input": given})["status"] == "ACCEPT"
    return wait_until(lambda: (run := server.flow_run(flow_run_id))["state_type"] in ("COMPLETED", "FAILED") and run, 120)


def mlflow_of(server: Server, run_id: str) -> tuple[str, dict[str, str]]:
    with sqlite3.connect(server.home / ".mlflow" / "mlflow.db") as database:
        ((status,),) = database.execute("select status from runs where run_uuid = ?", [run_id])
        return status, dict(database.execute("select key, value from tags where run_uuid = ?", [run_id]))


def test_run_that_waits_for_approval_has_no_process_and_is_not_taken_for_dead(first, pools):
    waiting = start_and_wait_for_the_question(pools)
    assert "no run is dead" in pools.posttrain("sweep").stdout
    assert json.loads((waiting["folder"] / "summary.json").read_text())["status"] == "waiting"
    assert mlflow_of(pools, waiting["mlflow_run_id"])[0] == "RUNNING"
    refused = pools.api(
        f"/flow_runs/{waiting['id']}/resume", {"run_input": {"decision": "perhaps", "reviewer": "", "reason": "x"}}
    )
    assert refused["status"] == "REJECT"  # the form's own rules
    pools.api(f"/flow_runs/{waiting['id']}/set_state", {"state": {"type": "CANCELLING"}})
    wait_until(lambda: pools.flow_run(waiting["id"])["state_type"] == "CANCELLED", 30)
    assert waiting["folder"].name in pools.posttrain("sweep").stdout
    assert json.loads((waiting["folder"] / "summary.json").read_text())["exit_code"] == 130
    assert mlflow_of(pools, waiting["mlflow_run_id"])[0] == "KILLED"


def test_refused_release_fails_with_the_reviewers_reason_everywhere(first, pools):
    waiting = start_and_wait_for_the_question(pools)
    ended = answer(pools, waiting["id"], decision="refuse", reviewer="Ada", reason="too polite")
    summary = json.loads((waiting["folder"] / "summary.json").read_text())
    assert (ended["state_type"], ended["labels"]["posttrain.exit_code"], summary["exit_code"]) == ("FAILED", 6, 6)
    assert summary["approval"]["reviewer"] == "Ada" and "too polite" in summary["error"]
    assert [stage["status"] for stage in summary["stages"]] == ["cached"] * 11 + ["skipped"]  # nothing is promoted
    status, tags = mlflow_of(pools, waiting["mlflow_run_id"])
    assert (status, tags["approval"], tags["approval.by"], tags["approval.reason"]) == (
        "FINISHED",
        "refuse",
        "Ada",
        "too polite",
    )


def test_approved_release_completes_and_its_approval_stands_for_the_same_export(first, pools):
    pools.prefect("variable", "unset", f"posttrain-approval-{first['stages'][-1]['fingerprint']}")
    waiting = start_and_wait_for_the_question(pools)
    ended = answer(pools, waiting["id"], decision="approve", reviewer="Ada", reason="reads well")
    assert (ended["state_type"], ended["labels"]["posttrain.exit_code"]) == ("COMPLETED", 0)
    assert mlflow_of(pools, waiting["mlflow_run_id"])[0] == "FINISHED"
    code, again, said = run(pools, *ASKED)
    assert code == 0, said
    assert again["approval"]["reason"] == "reads well" and again["run_id"] != again["approval"]["run_id"]


def test_run_suspended_on_its_page_ends_after_its_stage_and_goes_on_from_the_store(first, pools):
    """Prefect lets running tasks end, and then the process: what they made is not made again."""
    known = set(pools.home.glob("quickstart/*"))
    sets = [part for override in [*SMALL, *PLACED, "recipe.sft.args.max_steps=62"] for part in ("--set", override)]
    assert pools.posttrain("run", "quickstart", "--deployment", "manual", *sets).returncode == 0

    def folders() -> list[Path]:
        return sorted(set(pools.home.glob("quickstart/*")) - known)

    wait_until(lambda: folders() and (folders()[0] / "sft" / "metrics.jsonl").is_file(), 90)
    process = json.loads((folders()[0] / "process.json").read_text())
    suspended = {
        "type": "PAUSED",
        "name": "Suspended",
        "state_details": {"pause_reschedule": True},
    }  # as the page's button does
    pools.api(f"/flow_runs/{process['flow_run_id']}/set_state", {"state": suspended})
    wait_until(lambda: (folders()[0] / "closed").is_file() and not is_alive(process["pid"]), 90)
    assert pools.flow_run(process["flow_run_id"])["state_name"] == "Suspended"
    assert mlflow_of(pools, process["mlflow_run_id"])[0] == "KILLED"
    assert "no run is dead" in pools.posttrain("sweep").stdout
    assert pools.api(f"/flow_runs/{process['flow_run_id']}/resume", {})["status"] == "ACCEPT"
    (done,) = wait_until(lambda: len(folders()) == 2 and list(folders()[1].glob("stages/*-sft.json")), 90)
    assert json.loads(done.read_text())["status"] == "cached"
    pools.api(f"/flow_runs/{process['flow_run_id']}/set_state", {"state": {"type": "CANCELLING"}})
    wait_until(lambda: pools.flow_run(process["flow_run_id"])["state_type"] == "CANCELLED", 60)
