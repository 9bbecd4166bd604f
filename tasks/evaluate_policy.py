"""Ask base, SFT, policy and champion the same held-out questions."""

from pathlib import Path

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from profiles.schema import Profile
from tasks.artifacts import Artifact, task_folder
from tasks.build import Stage, build
from tasks.champion import choose_opponent
from tasks.errors import ProfileError
from tasks.pipeline_run import PipelineRun
from tasks.stage_config import with_model
from tasks.train_policy import judge


@task(task_run_name="evaluate", cache_policy=NO_CACHE, persist_result=False)
def evaluate_policy(
    run: PipelineRun,
    base: Artifact,
    sft: Artifact | None,
    policy: Artifact,
    merged: Artifact,
    rows: Artifact,
    reward_model: Artifact | None = None,
) -> Artifact | State:
    """Return every model's score on every row of every metric (samples.jsonl); metrics are their means.

    The champion, if there is one, is asked the same. `canary/kl_to_champion` is the policy's KL to it. Raises ReleaseFailed if
    the store has lost the champion's export.
    """
    champion = choose_opponent(run, policy).export
    stage = evaluate_stage(run.profile, base, sft, policy, merged, rows, champion, reward_model)
    return build(run, stage, run.profile.placement.of("evaluate"))


def refuse_tools(held_out: Artifact) -> None:
    """Raise ProfileError for held-out rows with tools: training renders them into the prompt, and what asks models does not."""
    import pyarrow.parquet as pq

    if "tools" in pq.read_schema(held_out / "rows.parquet").names:
        raise ProfileError(
            "the rows of recipe.datasets.eval come with `tools`. Evaluation, canaries and the parity test would ask without "
            "them: the models would be judged on other prompts than those they were trained on. Render the tools into the "
            "prompts, or hold out rows without them."
        )


def evaluate_stage(
    profile: Profile,
    base: Artifact,
    sft: Artifact | None,
    policy: Artifact,
    merged: Artifact,
    rows: Artifact,
    champion: Artifact | None,
    reward_model: Artifact | None = None,
) -> Stage:
    """Return the stage; `policy` is read for its tokenizer, `merged` for its weights.

    `champion` is an export (full weights), and `reward_model` is read if `win_rate` asks for it.
    A task folder is an input like the rows: its bytes, not its place, are what the evaluation is keyed on.
    """
    recipe, asked = profile.recipe, profile.recipe.evaluate
    given = {"base_model": base, "sft": sft, "policy": policy, "merge": merged, "rows": rows, "champion": champion}
    given |= {"reward_model": reward_model if asked.win_rate else None}
    given |= {"task_folder": task_folder(Path(asked.task_folder)) if asked.task_folder else None}
    inputs = {name: artifact for name, artifact in given.items() if artifact is not None}
    canaries = judge(profile, rows)["canaries"]
    compared = {"canaries": {name: canaries[name] for name in ("num_prompts", "max_new_tokens", "batch_size")}}
    config = with_model(recipe, base, **asked.model_dump(exclude={"task_folder"}), **(compared if champion else {}))
    return Stage("evaluate", "tasks.jobs.evaluate", config, inputs, recipe.seed)
