"""The shipped prefect.yaml on a real server: what it deploys, and that its schedule really schedules."""

import json
import os
import subprocess
import sys

import pytest
from real_server import wait_until

from profiles.load import shipped

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


def test_deployed_yields_a_scheduled_run_of_the_nightly_deployment(server):
    """With SQLAlchemy 2.1 it silently never would."""
    listing = ["flow-run", "ls", "--flow-name", "post-training", "--output", "json"]
    runs = wait_until(lambda: json.loads(server.prefect(*listing)), 90, lambda: "no scheduled run after 90 s")
    assert {run["state"]["type"] for run in runs} == {"SCHEDULED"}


def test_run_form_offers_the_shipped_profiles_and_the_overrides(server):
    deployment = server.api("/deployments/name/post-training/manual")
    properties = deployment["parameter_openapi_schema"]["properties"]
    assert properties["profile"]["enum"] == shipped()
    assert "overrides" in properties and deployment["enforce_parameter_schema"] is True


def test_every_pool_has_its_queues_and_its_tagged_deployment(server):
    pools = {pool["name"]: pool for pool in server.api("/work_pools/filter", {})}
    assert {"orchestrator", "cpu", "gpu-h100"} <= pools.keys()
    assert pools["gpu-h100"]["concurrency_limit"] == 8
    queues = {queue["name"]: queue["priority"] for queue in server.api("/work_pools/gpu-h100/queues/filter", {})}
    assert queues["interactive"] < queues["nightly"]
    assert server.api("/deployments/name/accelerate-job/gpu-h100")["tags"] == ["gpu", "h100", "nvlink"]


def test_pools_again_changes_nothing_and_makes_no_second_automation(server):
    before = server.api("/automations/filter", {})
    done = server.posttrain("pools")
    assert done.returncode == 0 and "created" not in done.stdout
    assert {a["id"] for a in server.api("/automations/filter", {})} == {a["id"] for a in before}


def test_deployment_that_does_not_exist_is_refused_before_anything_runs(server):
    done = server.posttrain("run", "quickstart", "--deployment", "nope", "--wait")
    assert done.returncode == 2 and "nope" in done.stderr


def test_dataset_event_starts_the_run_that_its_payload_names(server):
    payload = json.dumps({"profile": "quickstart-dpo"})
    event = ["event", "emit", "posttrain.dataset.updated", "--resource-id", "dataset.digits", "--payload", payload]
    server.prefect(*event)
    asked = {"deployments": {"name": {"any_": ["on-dataset"]}}}
    (run,) = wait_until(lambda: server.api("/flow_runs/filter", asked), 60, lambda: "no run 60 s after the event")
    assert run["parameters"]["profile"] == "quickstart-dpo" and run["created_by"]["type"] == "AUTOMATION"


def test_tags_that_no_pool_has_name_what_was_asked_what_there_is_and_what_is_lacking(server):
    done = server.posttrain("run", "quickstart", "--set", "placement.default.tags=[gpu, b200]")
    assert done.returncode == 4
    for part in ("gpu, b200", "gpu-h100", "lacks b200", "lacks b200, gpu", "placement.tags"):
        assert part in done.stderr, done.stderr


HOLDER = """
import sys, time
from tasks.champion import exclusive
print("ready", flush=True)
sys.stdin.readline()
with exclusive("mine"):
    entered = time.time()
    time.sleep(1)
    print(entered, time.time(), flush=True)
"""


def test_two_machines_that_release_at_once_take_turns_through_the_server(server):
    """Each has a home folder of its own, so no lock file in common: the server's concurrency limit is all that they share."""
    machines = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=server.env | {"POSTTRAIN_HOME": str(server.folder / name), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )
        for name in ("one", "two")
    ]  # fmt: skip
    for machine in machines:
        assert machine.stdout.readline() == "ready\n"
    for machine in machines:
        machine.stdin.write("go\n")
        machine.stdin.flush()
    times = sorted(tuple(map(float, machine.communicate(timeout=120)[0].split())) for machine in machines)
    assert times[0][1] <= times[1][0]
