"""The whole pipeline on one screen: validate, SFT, reward model, policy, merge, evaluate, gate, export, promote."""

from typing import Annotated, Any

from prefect import State, Task, flow
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.states import Cancelled
from pydantic import Field

from flows.approval import require_approval
from flows.plan import plan, wanted_datasets
from flows.reporting import gate_candidate, reported
from flows.sweep import sweep_runs
from profiles.load import shipped
from profiles.schema import Budget
from tasks.artifacts import Artifact
from tasks.attempts import retried
from tasks.check_profile import check_columns, check_profile, load_profile
from tasks.errors import RunCancelled
from tasks.evaluate_policy import evaluate_policy, refuse_tools
from tasks.export_vllm import export_vllm
from tasks.interrupts import interrupts, suspension
from tasks.ledger import refuse_before
from tasks.merge_lora import merge_lora
from tasks.pipeline_run import PipelineRun, open_pipeline_run, suspended_run
from tasks.prepare_data import find_base_model, prepare_data
from tasks.promote_model import promote_model
from tasks.push_to_hub import find_token, push_to_hub
from tasks.train_policy import train_policy
from tasks.train_reward_model import train_reward_model
from tasks.train_sft import train_sft
from tasks.validate_data import validate_data
from tasks.watch import watched

# the run form's list; only a server holds a run to it
ProfileChoice = Annotated[str, Field(json_schema_extra={"enum": shipped()})]
NO_OVERRIDES: list[str] = []  # None would make the form ask for the type first


@flow(name="post-training", flow_run_name="{profile}", persist_result=False, log_prints=False)
def post_training(profile: ProfileChoice, overrides: list[str] = NO_OVERRIDES) -> dict[str, Any] | State:
    """Take a profile to an export that vLLM serves, and return the run's summary.

    Args:
        profile: name of a shipped profile; run from here, also the path of a YAML file
        overrides: `key.path=value` settings over the profile's own

    Raises the PipelineError of the stage that stopped it; a cancelled run ends in Prefect's state Cancelled.
    """
    run = suspended_run(flow_run.id) or new_run(profile, overrides)
    summary: dict[str, Any] = {}
    try:
        with reported(run, summary), watched(flow_run.id, stop=run.stop):
            run_to_the_end(run)
    except (RunCancelled, *interrupts()) as error:
        if isinstance(error.__cause__, suspension()):
            raise error.__cause__ from None
        return Cancelled(message=str(error) or "the run was interrupted between two jobs", data=summary)
    return summary


def new_run(profile: str, overrides: list[str]) -> PipelineRun:
    """Open a run of a profile that does not contradict itself; raises ProfileError before there is one."""
    loaded = load_profile(profile, overrides)
    check_profile(loaded)
    if loaded.release.push_to_hub:
        find_token()  # that there is none must not be found out after hours of training
    sweep_runs()
    if loaded.budget != Budget():
        refuse_before(loaded.name, loaded.budget, [row["stage"] for row in plan(loaded) if row["status"] == "run"])
    return open_pipeline_run(loaded, flow_run.id)


def run_to_the_end(run: PipelineRun) -> None:
    """Run the stages, ask, then release; whatever stops one of them, no thread goes on with a job that nobody waits for."""
    try:
        if not run.was_suspended:
            run_stages(run)
        if run.profile.gates.approval:
            require_approval(run)
        version = done(run, start(promote_model, run))
        if run.profile.release.push_to_hub:
            done(run, start(push_to_hub, run, version))
    except suspension() as pause:
        run.stop.set()
        if run.was_suspended:
            raise
        raise RunCancelled("someone suspended the run; resumed, it opens a new one, which goes on from the store") from pause
    except BaseException:
        run.stop.set()
        raise


def run_stages(run: PipelineRun) -> None:
    """Run every stage of the recipe as soon as its inputs are there; what does not depend on each other runs side by side."""
    recipe = run.profile.recipe
    made = None
    if recipe.prepare:
        sampled = find_base_model(run.profile, None) if recipe.prepare.base_model else None
        made = run.store.fetch(done(run, launched("prepare", prepare_data, run, sampled)))
    base = find_base_model(run.profile, made)
    held_out = run.store.fetch(done(run, start(validate_data, run, "eval", made, base, None)))
    refuse_tools(held_out)
    validations = {name: start(validate_data, run, name, made, base, held_out) for name in wanted_datasets(recipe)}
    data = all_done(run, validations)
    check_columns(run.profile, held_out, run.store.fetch(data[recipe.policy.rows]))

    training = {}
    if recipe.sft:
        training["sft"] = launched("sft", train_sft, run, base, data["sft"])
    if recipe.reward_model:
        training["reward_model"] = launched("reward_model", train_reward_model, run, base, data["preference"])
    trained = all_done(run, training)
    sft, reward_model = trained.get("sft"), trained.get("reward_model")
    rows = data[recipe.policy.rows]
    policy = done(run, launched("policy", train_policy, run, base, sft, rows, reward_model, held_out))

    merged = done(run, launched("merge", merge_lora, run, base, policy))
    evaluation = done(run, launched("evaluate", evaluate_policy, run, base, sft, policy, merged, held_out, reward_model))
    gate_candidate(run, policy, run.store.fetch(evaluation))
    done(run, launched("export", export_vllm, run, base, policy, merged, held_out, evaluation))


def launched(stage: str, task: Task, run: PipelineRun, *args: Any) -> PrefectFuture:
    """Start a stage's task; Prefect tries it again after a failure that another attempt can mend."""
    return task.with_options(**retried(run, run.profile.placement.of(stage))).submit(run, *args)


def start(task: Task, *args: Any) -> PrefectFuture:
    """Start a task in a thread of this process; `args` are artifacts that are there, never futures."""
    return task.submit(*args)


def done(run: PipelineRun, future: PrefectFuture) -> Artifact:
    return all_done(run, {"": future})[""]


def all_done(run: PipelineRun, futures: dict[str, PrefectFuture]) -> dict[str, Artifact]:
    """Wait for all, then return their artifacts, or raise what stopped the first of them.

    One that fails does not stop the others: what they build is kept, and the next run finds it. When the run itself is
    stopped, every thread ends its job before this returns: Prefect would leave them running.
    """
    try:
        wait(list(futures.values()))
    except interrupts():
        run.stop.set()
        wait(list(futures.values()))
        raise
    return {name: future.result() for name, future in futures.items()}
