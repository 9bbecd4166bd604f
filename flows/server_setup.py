"""`posttrain pools`: what a server needs before `prefect deploy --all`: work pools, their queues, and one automation."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from tasks.environment import HEARTBEAT_SECONDS
from tasks.errors import ProfileError

QUEUES = {"interactive": 1, "nightly": 2}  # priority: 1 goes first
BEATS = 5  # a server that was away for a minute, and forgot who beat meanwhile, must not call living runs crashed
ZOMBIES = "posttrain: runs without a heartbeat have crashed"
FLOWS = ["post-training", "accelerate-job", "sweep"]  # others' runs on the same server may beat more slowly


def set_up(file: Path) -> list[str]:
    """Create or update what `definitions.pools` of a prefect.yaml lists; returns a line per thing, and can be repeated."""
    wanted = read_pools_file(file)
    with get_client(sync_client=True) as client:
        lines = [_pool(client, name, settings, file.parent) for name, settings in wanted.items()]
        lines += [_queue(client, pool, queue) for pool in wanted for queue in QUEUES]
    return [*lines, _crash_zombies()]


def read_pools_file(file: Path) -> dict[str, dict[str, Any]]:
    """Return the pools that a prefect.yaml defines; raises ProfileError naming what is wrong."""
    if not file.is_file():
        raise ProfileError(f"--file is {str(file)!r}: there is no such file. Run it where prefect.yaml lies, or name it.")
    pools = (yaml.safe_load(file.read_text()).get("definitions") or {}).get("pools") or {}
    known = {"type", "concurrency_limit", "description", "base_job_template"}
    for name, settings in pools.items():
        if unknown := sorted(settings.keys() - known):
            raise ProfileError(f"definitions.pools.{name} of {file} has {unknown[0]!r}; there is: {', '.join(sorted(known))}.")
    if not pools:
        raise ProfileError(f"{file} has no definitions.pools: there is nothing to create.")
    return pools


def _pool(client: SyncPrefectClient, name: str, settings: dict[str, Any], folder: Path) -> str:
    given = {key: value for key, value in settings.items() if key in ("concurrency_limit", "description")}
    if template := settings.get("base_job_template"):
        given["base_job_template"] = json.loads((folder / template).read_text())
    try:
        there = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=settings["type"], **given))
        return f"pool {name}: created ({settings['type']})"
    if there.type != settings["type"]:
        raise ProfileError(f"the pool {name} is of type {there.type}, not {settings['type']}: delete it, or rename one.")
    client.update_work_pool(name, WorkPoolUpdate(**given))
    return f"pool {name}: up to date"


def _queue(client: SyncPrefectClient, pool: str, queue: str) -> str:
    try:
        client.read_work_queue_by_name(queue, work_pool_name=pool)
    except ObjectNotFound:
        client.create_work_queue(name=queue, work_pool_name=pool, priority=QUEUES[queue])
        return f"queue {pool}/{queue}: created, priority {QUEUES[queue]}"
    return f"queue {pool}/{queue}: there"


def _crash_zombies() -> str:
    """A self-hosted server has no automation of its own for runs whose process is gone: five beats missed, and it crashed."""
    with get_client(sync_client=True) as client:
        if client.read_automations_by_name(ZOMBIES):
            return "automation for runs without a heartbeat: there"
    Automation(
        name=ZOMBIES,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"}, expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}), for_each={"prefect.resource.id"},
            match_related=ResourceSpecification({"prefect.resource.role": ["flow"], "prefect.resource.name": FLOWS}),
            posture=Posture.Proactive, threshold=1, within=timedelta(seconds=BEATS * HEARTBEAT_SECONDS),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {BEATS * HEARTBEAT_SECONDS} s")],
    ).create()  # fmt: skip
    return "automation for runs without a heartbeat: created"
