"""Check what only the job environment knows, before anything runs: TRL's arguments, names of reward functions and tasks."""

import json
import subprocess
from pathlib import Path
from typing import Any

from profiles.load import InvalidProfile, accelerate_file, load
from profiles.schema import STAGES, Evaluate, Gates, Online, Profile, Recipe, StagePlacement
from tasks.artifacts import Artifact, disk_errors, refuse_unusable_model, task_folder
from tasks.environment import home
from tasks.errors import MachineUnfit, ProfileError
from tasks.fingerprints import PROJECT, code_digest, fingerprint, library_versions
from tasks.local_job import job_environment, job_python
from tasks.pipeline_run import write_json
from tasks.token_facts import uses_of

CONFIG_CLASS = {
    "sft": "SFTConfig",
    "reward_model": "RewardConfig",
    "grpo": "GRPOConfig",
    "rloo": "RLOOConfig",
    "dpo": "DPOConfig",
    "kto": "KTOConfig",
}
TIMEOUT_SECONDS = 300  # importing TRL from a cold disk


def load_profile(name: str, overrides: list[str] | None = None) -> Profile:
    """Return the profile; raises ProfileError for a missing file, an unknown key, a wrong type, a contradiction."""
    try:
        profile = load(name, overrides)
        for stage in STAGES:
            accelerate_file(profile.placement.of(stage).accelerate)
    except InvalidProfile as error:
        raise ProfileError(str(error)) from None
    return profile


def check_profile(profile: Profile) -> None:
    """Raise ProfileError if TRL's config classes refuse the profile's `args`, or a reward function or a task does not exist.

    It takes an import of TRL, so the answer is kept by what was asked, the code and the library versions.
    """
    check_maker(profile.recipe)
    check_paths(profile.recipe)
    check_limits(profile.recipe)
    if problems := _answer(profile)["problems"]:
        raise ProfileError(f"profile {profile.name}: " + "\n".join(problems))


def check_columns(profile: Profile, held_out: Artifact, rows: Artifact) -> None:
    """Raise ProfileError if a reward function reads a column that its rows lack; `rows` are the policy's own.

    Found out here, before anything trains: TRL would say so in the policy's first step.
    """
    import pyarrow.parquet as pq

    recipe, wanted = profile.recipe, _answer(profile)["columns"]
    evaluate, policy = recipe.evaluate, recipe.policy
    read = [("eval", held_out, "recipe.evaluate.rewards", name) for name in evaluate.rewards]
    read += [("eval", held_out, "recipe.evaluate.scorer", evaluate.scorer)] if evaluate.metric == "accuracy" else []
    if isinstance(policy, Online):
        read += [("prompts", rows, "recipe.policy.reward_functions", reward.name) for reward in policy.reward_functions]
    for dataset, artifact, setting, name in read:
        columns = pq.read_schema(artifact / "rows.parquet").names
        if missing := [column for column in wanted.get(name, []) if column not in columns]:
            raise ProfileError(
                f"{setting} has {name!r}, which reads the column {missing[0]!r}; the rows of recipe.datasets.{dataset} have "
                f"{', '.join(column for column in columns if column != 'row')}. Map a column to it in "
                f"recipe.datasets.{dataset}.columns, or drop the function."
            )


def _answer(profile: Profile) -> dict[str, Any]:
    """Return what the job environment says of the profile, asked once."""
    placement = profile.placement.default
    python = job_python(placement)
    asked = question(profile)
    key = fingerprint({"asked": asked, "libraries": library_versions(python), "code": code_digest("tasks.jobs.check_args")})
    kept = home() / ".checks" / f"{key}.json"
    if not kept.is_file():
        with disk_errors(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, _ask(str(python), job_environment(placement), asked))
    return json.loads(kept.read_text())


def check_trainer_args(where: str, method: str, args: dict[str, Any]) -> None:
    """Raise ProfileError if the TRL config class of a method refuses arguments that stand in no profile."""
    if args and method in CONFIG_CLASS:
        asked = {"args": {where: [CONFIG_CLASS[method], args]}, "rewards": []}
        placement = StagePlacement()
        if problems := _ask(str(job_python(placement)), job_environment(placement), asked)["problems"]:
            raise ProfileError("\n".join(problems))


def check_maker(recipe: Recipe) -> None:
    """Raise ProfileError if the prepare stage names a maker that does not exist."""
    known = sorted(path.stem.removeprefix("make_") for path in (PROJECT / "tasks" / "jobs").glob("make_*.py"))
    if recipe.prepare and recipe.prepare.maker not in known:
        raise ProfileError(f"recipe.prepare.maker is {recipe.prepare.maker!r}; there is: {', '.join(known)}.")


def check_limits(recipe: Recipe) -> None:
    """Raise ProfileError if a dataset sets a limit that its contract does not have."""
    for name in type(recipe.datasets).model_fields:
        dataset = getattr(recipe.datasets, name)
        if dataset is None or not dataset.contract:
            continue
        from data_contracts.contract import ContractInvalid, contract_for
        from data_contracts.snapshot import drift_contract, split_limits

        limits, drift_limits = split_limits(dataset.contract)
        try:
            methods = {use.stage: use.method for use in uses_of(recipe, name)}
            contract_for(dataset.kind).with_tokens(methods).with_limits(limits)
            drift_contract().with_limits(drift_limits)
        except ContractInvalid as error:
            raise ProfileError(f"recipe.datasets.{name}.contract: {error}") from None


def check_paths(recipe: Recipe) -> None:
    """Raise ProfileError if a local base model or dataset that the recipe names is not there, before a run is opened."""
    if recipe.base_model.path:
        refuse_unusable_model("recipe.base_model", Path(recipe.base_model.path))
    for name in type(recipe.datasets).model_fields:
        dataset = getattr(recipe.datasets, name)
        if dataset is not None and dataset.path and not Path(dataset.path).exists():
            raise ProfileError(
                f"recipe.datasets.{name}.path is {dataset.path!r}: there is no such file or folder (looked from {Path.cwd()})."
            )
    if recipe.evaluate.task_folder:
        task_folder(Path(recipe.evaluate.task_folder))


def question(profile: Profile) -> dict[str, Any]:
    """Return what the job side is asked: each stage's config class and arguments, every reward's name, tasks and their gate."""
    recipe = profile.recipe
    stages = {"sft": ("sft", recipe.sft), "reward_model": ("reward_model", recipe.reward_model)}
    stages["policy"] = (recipe.policy.method, recipe.policy)
    args = {f"recipe.{where}": [CONFIG_CLASS[name], stage.args] for where, (name, stage) in stages.items() if stage}
    rewards = [r.name for r in recipe.policy.reward_functions] if isinstance(recipe.policy, Online) else []
    asked = {"args": args, "rewards": [*rewards, recipe.evaluate.scorer, *recipe.evaluate.rewards]}
    return asked | ({"tasks": lm_eval_tasks(recipe.evaluate, profile.gates)} if recipe.evaluate.tasks else {})


def lm_eval_tasks(evaluate: Evaluate, gates: Gates) -> dict[str, Any]:
    """Return the names of the asked tasks, the folder they may be in, its digest, and their metrics that the gate reads."""
    folder = task_folder(Path(evaluate.task_folder)) if evaluate.task_folder else None
    read = [*gates.floors, *gates.not_worse, *([gates.metric] if gates.metric else [])]
    gate = sorted({name for name in read if "/" in name and name.split("/")[0] not in ("reward", "win_rate", "win_rate_lc")})
    return {"names": evaluate.tasks, "folder": folder and folder.path, "digest": folder and folder.digest, "gate": gate}


def _ask(python: str, env: dict[str, str], asked: dict[str, Any]) -> dict[str, Any]:
    try:
        done = _run(python, env, asked)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineUnfit(f"the job environment {python} does not answer: {error}. Run `posttrain doctor`.") from None
    if done.returncode != 0:
        raise MachineUnfit(
            f"the job environment {python} does not work: {done.stderr.strip()[-2000:]}\nRun `posttrain doctor`."
        )
    return json.loads(done.stdout.splitlines()[-1])  # libraries may print lines of their own before it


def _run(python: str, env: dict[str, str], asked: dict[str, Any]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, "-m", "tasks.jobs.check_args"],
        input=json.dumps(asked), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=env,
    )  # fmt: skip
