"""`posttrain plan`: for each stage a hit or a run, and which fields of its identity differ from the last time."""

from dataclasses import dataclass, field
from typing import Any

from profiles.schema import METHODS, STAGES, Profile, Recipe
from tasks.artifacts import Artifact
from tasks.build import Stage
from tasks.champion import find_opponent
from tasks.evaluate_policy import evaluate_stage
from tasks.export_vllm import export_stage
from tasks.fingerprints import fingerprint
from tasks.ledger import estimate
from tasks.merge_lora import merge_stage
from tasks.pipeline_run import last_manifests, store
from tasks.prepare_data import find_base_model, prepare_stage
from tasks.train_policy import policy_stage
from tasks.train_reward_model import reward_model_stage
from tasks.train_sft import sft_stage
from tasks.validate_data import identify, locate_dataset, tokens_of

BLOCKS = {name: name for name in STAGES}  # a stage's part of the recipe; the policy's stage has its method's name


def plan(profile: Profile) -> list[dict[str, Any]]:
    """Return a row per stage, `{"stage", "status": "cached" | "run", "why": [...], "cost": {...} | None}`, in a run's order.

    The cost is that of the stage's last builds in this profile's runs, the median.
    """
    recipe, look = profile.recipe, _Lookup(profile)
    made = base = None
    if recipe.prepare:
        made = look.stage(
            "prepare", prepare_stage, *([find_base_model(profile, None)] if recipe.prepare.base_model else [None])
        )
    if made or not recipe.prepare or not recipe.base_model.prepared:
        base = find_base_model(profile, made)
    held_out = look.dataset("eval", made, base, None)
    data = {name: look.dataset(name, made, base, held_out) for name in wanted_datasets(recipe)}
    sft = look.stage("sft", sft_stage, base, data["sft"]) if recipe.sft else None
    pairs = data.get("preference")
    reward_model = look.stage("reward_model", reward_model_stage, base, pairs) if recipe.reward_model else None
    rows = data[recipe.policy.rows]
    needed = [a for a, there in ((sft, recipe.sft), (reward_model, recipe.reward_model)) if there]
    policy = look.stage(
        recipe.policy.method, policy_stage, base, sft, rows, reward_model, held_out, needed=[base, rows, *needed]
    )
    merged = look.stage("merge", merge_stage, base, policy)
    needed = [
        base,
        policy,
        merged,
        held_out,
        *([sft] if recipe.sft else []),
        *([reward_model] if recipe.evaluate.win_rate else []),
    ]
    champion = find_opponent(profile.name, store(), policy).export if policy else None
    asked = (base, sft, policy, merged, held_out, champion, reward_model)
    evaluation = look.stage("evaluate", evaluate_stage, *asked, needed=needed)
    look.stage("export", export_stage, base, policy, merged, held_out, evaluation)
    return look.rows


def wanted_datasets(recipe: Recipe) -> list[str]:
    """Return the training datasets that some stage of the recipe reads; the others are not even validated."""
    readers = {"sft": recipe.sft, "preference": recipe.reward_model, "unpaired": None, "prompts": None}
    readers[recipe.policy.rows] = recipe.policy
    return [name for name, reader in readers.items() if reader]


@dataclass
class _Lookup:
    """Walks the stages in order; one whose input is not built yet cannot have been built on it."""

    profile: Profile
    rows: list[dict[str, Any]] = field(default_factory=list)

    def stage(
        self, name: str, make: Any, *inputs: Artifact | None, needed: list[Artifact | None] | None = None
    ) -> Artifact | None:
        asked = [a for a in inputs if name != "prepare"] if needed is None else needed
        if any(a is None for a in asked):
            return self._add(name, None, ["an input of it would be built first"])
        built: Stage = make(self.profile, *inputs)
        placement = self.profile.placement.of("policy" if name in METHODS else name)
        return self._find(name, name, built.identity(placement))

    def dataset(self, name: str, made: Artifact | None, base: Artifact | None, held_out: Artifact | None) -> Artifact | None:
        dataset, stage = getattr(self.profile.recipe.datasets, name), f"validate-{name}"
        if (dataset.prepared and made is None) or base is None or (name != "eval" and held_out is None):
            return self._add(stage, None, ["an input of it would be built first"])
        source = locate_dataset(f"recipe.datasets.{name}", dataset, made)
        return self._find(stage, "dataset", identify(dataset, source, held_out, tokens_of(self.profile, name, base)))

    def _find(self, stage: str, folder: str, identity: dict[str, Any]) -> Artifact | None:
        key = fingerprint(identity)
        if (hit := store().find(folder, key)) is not None:
            if folder in ("prepare", "dataset"):  # the plan reads them, to see what follows
                hit = store().fetch(hit)
            return self._add(stage, hit, [f"{folder}/{key}"])
        last = next(last_manifests(self.profile.name, stage, folder), None)
        if last is None:
            return self._add(stage, None, ["never built"])
        return self._add(stage, None, [named(line, stage) for line in difference(last["identity"], identity)])

    def _add(self, stage: str, artifact: Artifact | None, why: list[str]) -> Artifact | None:
        cost = None if artifact else estimate(self.profile.name, stage)
        self.rows.append({"stage": stage, "status": "cached" if artifact else "run", "why": why, "cost": cost})
        return artifact


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return one line `field old → new` per field in which two identities differ, by the identity's own names."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key} {_short(before)} → {_short(after)}")
    return lines


def named(line: str, stage: str) -> str:
    """Return a line of `difference` by the profile's names: a stage's settings are one block of the recipe."""
    field, changed = line.split(" ", 1)
    head, _, rest = field.partition(".")
    top = rest.split(".")[0]
    if head != "recipe" or top == "seed":
        return line
    dtype = "recipe.export.dtype" if stage in ("merge", "export") else "recipe.base_model.dtype"
    shared = {"dtype": dtype, "base_digest": "recipe.base_model"}
    block = f"datasets.{stage.removeprefix('validate-')}" if stage.startswith("validate-") else BLOCKS.get(stage, "policy")
    return f"{shared.get(top, f'recipe.{block}.{rest}')} {changed}"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…{fingerprint({'text': text})[:4]}" if len(text) >= 64 else text
