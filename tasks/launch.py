"""Builds what a JobOrder asks for where its placement says: as a child process here, or on a work pool chosen by tags."""

import fcntl
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from profiles.schema import StagePlacement
from tasks.artifacts import Artifact, Store, disk_errors
from tasks.environment import home
from tasks.fingerprints import fingerprint
from tasks.guard import USAGE
from tasks.job_order import JobOrder
from tasks.job_spec import JobSpec
from tasks.local_job import Metrics
from tasks.pools import build_on_pool
from tasks.restart import run_governed

LOCAL = ["local"]
LOCAL_SLOT = threading.Lock()


def slot(placement: StagePlacement) -> AbstractContextManager:
    """Return what a stage holds while it is built: a run's jobs on this machine take turns; pools count for themselves."""
    return LOCAL_SLOT if placement.tags == LOCAL else nullcontext()


def launch(
    order: JobOrder,
    inputs: dict[str, Artifact],
    store: Store,
    on_metrics: Callable[[Metrics], None],
    stop: threading.Event,
) -> Artifact:
    """Return the order's artifact, built and committed; raises what `build_here` raises, whichever machine did it."""
    if order.placement.tags == LOCAL:
        paths = {name: store.fetch(artifact).path for name, artifact in inputs.items()}
        return build_here(order, paths, store, on_metrics, stop)
    references = {name: store.reference(artifact) for name, artifact in inputs.items()}
    return build_on_pool(order.model_copy(update={"inputs": references}), store, on_metrics, stop)


def build_here(
    order: JobOrder, inputs: dict[str, str], store: Store, on_metrics: Callable[[Metrics], None], stop: threading.Event
) -> Artifact:
    """Run the job as a child of this process, with `inputs` on this machine, and commit what it left.

    Raises DriftHalted, JobFailed, MachineUnfit or RunCancelled; nothing of a failed build is left in the store.
    """
    start = time.monotonic()
    (work_folder(order) / USAGE).unlink(missing_ok=True)
    with store.staging(order.stage, order.fingerprint) as staged, checkpoint_folder(order) as (checkpoints, lock):
        spec = JobSpec(
            stage=order.stage, module=order.module, seed=order.seed, config=order.config, drift=order.drift,
            inputs=inputs, output=staged, work=work_folder(order), checkpoints=checkpoints,
            checkpoint_seconds=order.placement.checkpoint_seconds,
        )  # fmt: skip
        result = run_governed(spec, order.placement, on_metrics, stop, lock)
        details = result.details | {"made_of": order.made_of}
        details |= {"judged_by": fingerprint(order.drift), "canaries": order.drift["canaries"]["key"]} if order.drift else {}
        built = Artifact(
            order.stage, str(staged), order.fingerprint, "", result.metrics, details, order.mlflow_run_id,
            round(time.monotonic() - start, 2),
        )  # fmt: skip
        artifact = store.commit(staged, built, order.identity)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return artifact


def work_folder(order: JobOrder) -> Path:
    """Return the folder of the job's log, metrics and result on this machine."""
    folder = home() / order.work
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def checkpoint_folder(order: JobOrder) -> Iterator[tuple[Path, int]]:
    """Yield where the job saves and looks for checkpoints, with the lock that the job must hold to its end.

    It is one folder per fingerprint, or the job's own while another job has that.
    """
    shared = home() / ".checkpoints" / order.stage / order.fingerprint
    with disk_errors(shared):
        shared.mkdir(parents=True, exist_ok=True)
    with (shared.parent / f"{order.fingerprint}.lock").open("w") as lock:
        free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        yield shared if free else work_folder(order) / "checkpoints", lock.fileno()
