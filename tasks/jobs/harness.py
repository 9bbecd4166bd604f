"""lm-evaluation-harness: the tasks, and what a model scored on them.

Tasks are lm-eval's own by name, and those of the profile's `task_folder`: YAML files beside their data. What a folder's YAML
names is looked for beside that YAML, and must lie in the folder, for the folder's bytes are what the evaluation is keyed on.
"""

import difflib
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.api.registry import get_metric_aggregation, is_higher_better
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import hash_string
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
INCLUDE = re.compile(r"^include:\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Tasks:
    """The asked tasks, groups and tags, found and their data loaded; `leaves` are the single tasks behind the names."""

    names: list[str]
    manager: TaskManager
    leaves: dict[str, Task]


@dataclass(frozen=True)
class Measured:
    """One model's results: `lines` have metric, row and score; `scalars` are metrics that have no value per row."""

    lines: list[Row] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


class FolderTasks(TaskFactory):
    """lm-eval's factory, with the paths in a YAML of `folder` taken from where that YAML is, not from where the job runs."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def _load_full_config(self, entry: Entry, overrides: Row | None = None) -> Row:
        config = super()._load_full_config(entry, overrides)
        if entry.yaml_path is None or not entry.yaml_path.is_relative_to(self.folder):
            return config
        if str(config.get("dataset_path", "")).startswith((".", "/")):
            config["dataset_path"] = self._inside(entry.yaml_path, config["dataset_path"])
        for name in ("data_files", "data_dir"):
            if name in (kwargs := config.get("dataset_kwargs") or {}):
                kwargs[name] = self._inside(entry.yaml_path, kwargs[name])
        return config

    def _inside(self, yaml: Path, given: Any) -> Any:
        if isinstance(given, dict):
            return {split: self._inside(yaml, name) for split, name in given.items()}
        if isinstance(given, list):
            return [self._inside(yaml, name) for name in given]
        if "://" in given:
            return given
        path = Path(os.path.normpath(yaml.parent / given))
        if not path.is_relative_to(self.folder) or any(p.startswith(".") for p in path.relative_to(self.folder).parts):
            raise ValueError(
                f"{yaml.name} reads {given!r}, which is outside recipe.evaluate.task_folder or hidden in it: other bytes there "
                "would be the same evaluation. Put the file beside the YAML."
            )
        return str(path)


def find_tasks(names: list[str], folder: Path | None) -> TaskManager:
    """Return the index that has every name; raises ValueError with near names for one that is in neither place.

    lm-eval's own index takes ten seconds to read, so it is left out where the folder alone has all that is asked for.
    """
    folder = Path(os.path.abspath(folder)) if folder else None
    refuse_includes(folder)
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not all(_is_single(manager, name) for name in names):
        manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.task_index]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3, cutoff=0.5)
        raise ValueError(
            f"recipe.evaluate.tasks names {unknown[0]!r}, which is neither a task of lm-eval {lm_eval.__version__} nor of "
            f"recipe.evaluate.task_folder.{' Did you mean ' + ' or '.join(near) + '?' if near else ''}{_unreadable(folder)}"
        )
    if folder:
        manager._factory = FolderTasks(folder)
    return manager


def refuse_includes(folder: Path | None) -> None:
    """Raise ValueError for a YAML that includes one outside the folder, whose bytes the evaluation is not keyed on."""
    for path in sorted(folder.rglob("*.yaml")) if folder else []:
        for given in INCLUDE.findall(path.read_text(encoding="utf-8", errors="replace")):
            included = Path(os.path.normpath(path.parent / given.strip("'\"")))
            if not included.is_relative_to(folder):
                raise ValueError(
                    f"{path.name} includes {given}, which is outside recipe.evaluate.task_folder: other bytes there would be "
                    "the same evaluation. Put the file beside the YAML."
                )


def unjudgeable(metrics: list[str], names: list[str], manager: TaskManager) -> list[str]:
    """Return a sentence for each metric of the gate that the asked tasks will not measure row by row, the higher the better.

    What a task's YAML leaves to lm-eval is not told.
    """
    single = {leaf for name in names for leaf in _leaves(manager, name)}
    problems = []
    for metric in metrics:
        task = metric.rpartition("/")[0]
        if task not in single:
            near = difflib.get_close_matches(task, sorted(single), n=3, cutoff=0.3)
            problems.append(
                f"the gate names {metric!r}, and {task!r} is no single task of recipe.evaluate.tasks: it has no score per "
                f"row. Name a metric of one of them{': ' + ', '.join(near) if near else ''}."
            )
        elif (known := _by_row(manager.task_index[task])) is not None and metric not in known:
            problems.append(
                f"the gate names {metric!r}, but row by row, the higher the better, {task} measures "
                f"{', '.join(sorted(known)) or 'nothing'}. Name one of these."
            )
    return problems


def _leaves(manager: TaskManager, name: str) -> set[str]:
    """Return the single tasks behind a task's, tag's or group's name."""
    entry = manager.task_index[name]
    if entry.kind == Kind.TAG:
        return set(entry.tags)
    if entry.kind != Kind.GROUP:
        return {name}
    children = (child if isinstance(child, str) else child.get("task", "") for child in (entry.cfg or {}).get("task", []))
    return {leaf for child in children if child in manager.task_index for leaf in _leaves(manager, child)}


def _by_row(entry: Entry) -> set[str] | None:
    """Return a task's metrics that are means of a score per row, the higher the better; None if its YAML names none."""
    config = entry.cfg or {}
    if not isinstance(config.get("metric_list"), list):
        return None
    filters = [own["name"] for own in config.get("filter_list") or [{"name": "none"}]]
    means = [
        own["metric"]
        for own in config["metric_list"]
        if isinstance(own.get("metric"), str) and _is_mean(own) and _is_higher_better(own)
    ]
    return {metric_name(entry.name, metric, chosen) for metric in means for chosen in filters}


def _is_mean(metric: Row) -> bool:
    if "aggregation" in metric:
        return metric["aggregation"] == "mean"
    return get_metric_aggregation(metric["metric"]) is mean


def _is_higher_better(metric: Row) -> bool:
    return metric.get("higher_is_better", is_higher_better(metric["metric"]) is not False)


def _is_single(manager: TaskManager, name: str) -> bool:
    return name in manager.task_index and manager.task_index[name].kind in (Kind.TASK, Kind.PY_TASK)


def _unreadable(folder: Path | None) -> str:
    """Return what is wrong with the folder's YAML files: lm-eval passes over one that it cannot read."""
    for path in sorted(folder.rglob("*.yaml")) if folder else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever YAML, include or file system have against it
            return f" {path.name} there cannot be read: {error}"
    return ""


def load_tasks(names: list[str], folder: Path | None, cache: Path) -> Tasks:
    """Return the tasks with their data, converted under `cache`; raises ValueError for one that does not exist or run here."""
    sys.dont_write_bytecode = True  # a task's own code is imported from the folder, which must keep its digest
    datasets.config.HF_DATASETS_CACHE = cache
    manager = find_tasks(names, folder)
    leaves = manager.load(names)["tasks"]
    for name, task in leaves.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that a model wrote" if getattr(task, "UNSAFE_CODE", False) else "asks about images or sound"
            raise ValueError(f"recipe.evaluate.tasks has {name!r}, which {what}: it cannot run here. Drop it from the list.")
        if lost := [metric for metric, aggregate in task.aggregation().items() if aggregate is None]:
            raise ValueError(f"the task {name!r} aggregates {lost[0]!r} by a name that lm-eval does not know: mend its YAML.")
    return Tasks(names, manager, leaves)


def loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> LM:
    """Return lm-eval's view of a model that is loaded here."""
    # a base's own generation_config may hold a repetition penalty, which applies to greedy decoding too
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def run_tasks(tasks: Tasks, model: LM, config: Row, *, seed: int, chat: bool) -> Measured:
    """Return the model's results; `chat` renders prompts with the tokenizer's template, few-shot examples as turns.

    Raises RuntimeError for a score that is no finite number.
    """
    results = lm_eval.simple_evaluate(
        model=model, tasks=tasks.names, task_manager=tasks.manager, num_fewshot=config["num_fewshot"], limit=config["limit"],
        apply_chat_template=chat, bootstrap_iters=0,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    measured = Measured()
    for name, samples in results["samples"].items():
        measured.lines.extend(_lines(tasks.leaves[name], name, samples))
        measured.hashes[name] = task_hash(samples)
    by_row = {line["metric"] for line in measured.lines}
    scalars = {key: value for name, own in results["results"].items() for key, value in _aggregates(name, own).items()}
    measured.scalars.update({key: value for key, value in scalars.items() if key not in by_row})
    return measured


def task_hash(samples: list[Row]) -> str:
    """Return lm-eval's own hash of a task as it was asked: every document, rendered prompt and target."""
    return hash_string("".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples))


def metric_name(task: str, metric: str, chosen: str) -> str:
    """Return `<task>/<metric>`, with lm-eval's filter after a colon where there is one; MLflow refuses other signs."""
    name = f"{task}/{metric}" if chosen == "none" else f"{task}/{metric}:{chosen}"
    return "".join(sign if sign.isalnum() or sign in "_-./: " else "_" for sign in name)


def _lines(task: Task, name: str, samples: list[Row]) -> list[Row]:
    """Return a line per row and metric, of the metrics that are the mean of one number per row, the higher the better.

    The gate takes a higher score for the better one; where it is not, the mean alone is kept.
    """
    num_rows = len({sample["doc_id"] for sample in samples})
    lines = []
    for metric, chosen in dict.fromkeys((metric, sample["filter"]) for sample in samples for metric in sample["metrics"]):
        own = [sample for sample in samples if sample["filter"] == chosen and metric in sample["metrics"]]
        is_mean = task.aggregation().get(metric, mean) is mean
        if (
            is_mean
            and task.higher_is_better().get(metric, True)
            and len(own) == num_rows
            and all(_is_number(sample[metric]) for sample in own)
        ):
            lines += [_line(metric_name(name, metric, chosen), sample, sample[metric]) for sample in own]
    return lines


def _line(metric: str, sample: Row, value: Any) -> Row:
    if not math.isfinite(value):
        raise RuntimeError(f"{metric} of row {sample['doc_id']} is {value}: it cannot be compared. Drop the task or the row.")
    said = sample["filtered_resps"][0]
    details = {"response": said} if isinstance(said, str) else {}
    return {"metric": metric, "row": sample["doc_id"], "score": float(value), "target": str(sample["target"])} | details


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "item") and getattr(value, "size", 1) == 1)


def _aggregates(name: str, results: Row) -> dict[str, float]:
    """Return a task's or group's aggregated metrics; raises RuntimeError for one that is no finite number."""
    found = {}
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if not _is_number(value) or not math.isfinite(value):
            raise RuntimeError(f"{name}/{metric} is {value!r}, which is no finite number. Drop the task from evaluate.tasks.")
        found[metric_name(name, metric, chosen)] = float(value)
    return found
