"""The whole pipeline on one screen: validate, SFT, reward model, policy, evaluate, gate, merge, export."""

from typing import Any

from prefect import State, flow
from prefect.states import Cancelled

from flows.reporting import gate_candidate, reported
from profiles.schema import Grpo, Recipe
from tasks.artifacts import Artifact
from tasks.check_profile import check_profile, load_profile
from tasks.errors import RunCancelled
from tasks.evaluate_policy import evaluate_policy
from tasks.export_vllm import export_vllm
from tasks.interrupts import interrupts
from tasks.merge_lora import merge_lora
from tasks.pipeline_run import PipelineRun, open_pipeline_run
from tasks.prepare_data import find_base_model, prepare_data
from tasks.train_policy import train_policy
from tasks.train_reward_model import train_reward_model
from tasks.train_sft import train_sft
from tasks.validate_data import validate_data


@flow(name="post-training", flow_run_name="{profile}", persist_result=False, log_prints=False)
def post_training(profile: str, overrides: list[str] | None = None) -> dict[str, Any] | State:
    """Take a profile to an export that vLLM serves, and return the run's summary.

    Args:
        profile: name of a shipped profile, or path of a YAML file
        overrides: `key.path=value` settings over the profile's own

    Raises the PipelineError of the stage that stopped it; a cancelled run ends in Prefect's state Cancelled.
    """
    loaded = load_profile(profile, overrides)
    check_profile(loaded)
    run = open_pipeline_run(loaded)
    summary: dict[str, Any] = {}
    try:
        with reported(run, summary):
            run_stages(run)
    except (RunCancelled, *interrupts()) as error:
        return Cancelled(message=str(error) or "the run was interrupted between two jobs", data=summary)
    return summary


def run_stages(run: PipelineRun) -> None:
    """Run every stage of the recipe, in the order in which each one's inputs are there."""
    recipe = run.profile.recipe
    made = None
    if recipe.prepare:
        made = do(prepare_data, run, find_base_model(run.profile, None) if recipe.prepare.base_model else None)
    base = find_base_model(run.profile, made)
    held_out = do(validate_data, run, "eval", made, None)
    data = {name: do(validate_data, run, name, made, held_out) for name in wanted_datasets(recipe)}

    sft = do(train_sft, run, base, data["sft"]) if recipe.sft else None
    reward_model = do(train_reward_model, run, base, data["preference"]) if recipe.reward_model else None
    rows = data["prompts" if isinstance(recipe.policy, Grpo) else "preference"]
    policy = do(train_policy, run, base, sft, rows, reward_model)

    evaluation = do(evaluate_policy, run, base, sft, policy, held_out)
    gate_candidate(run, evaluation)
    merged = do(merge_lora, run, base, policy)
    do(export_vllm, run, base, policy, merged, held_out, evaluation)


def wanted_datasets(recipe: Recipe) -> list[str]:
    """Return the training datasets that some stage of the recipe reads; the others are not even validated."""
    wanted = {"sft": recipe.sft, "preference": recipe.reward_model, "prompts": None}
    wanted["prompts" if isinstance(recipe.policy, Grpo) else "preference"] = recipe.policy
    return [name for name, reader in wanted.items() if reader]


def do(task: Any, *args: Any) -> Artifact:
    """Run a task here and return its artifact; a task that found its work done returns a state, which has it inside."""
    return task(*args, return_state=True).result()
