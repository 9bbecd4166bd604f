"""Checks a profile's `args` blocks against the installed TRL's config classes, and its rewards and tasks against what exists.

Reads a JSON object on standard input, {"args": {name: [class name, args]}, "rewards": [names]} and perhaps "tasks": {"names",
"folder"}; writes {"problems": [sentences], "columns": {reward: [names]}}: no problem if all of it holds, and the columns that
each reward function reads, which the rows are held against once they are there.
"""

import dataclasses
import difflib
import json
import sys
from pathlib import Path

from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.online import columns_of

NUMBERS = ("<class 'int'>", "<class 'float'>", "<class 'bool'>", "int | None", "float | None", "bool | None")


def main() -> None:
    asked = json.load(sys.stdin)
    problems = [p for where, (name, args) in asked["args"].items() for p in check_args(where, name, args)]
    problems += [p for name in asked["rewards"] if (p := check_reward(name))]
    problems += check_tasks(**asked["tasks"]) if "tasks" in asked else []
    rewards = [name for name in asked["rewards"] if name != "reward_model" and not check_reward(name)]
    json.dump({"problems": problems, "columns": {name: columns_of(name) for name in rewards}}, sys.stdout)


def check_args(where: str, class_name: str, args: dict) -> list[str]:
    """Return what is wrong with `args` for the TRL config class: unknown names first, then values it refuses."""
    import trl

    config_class = getattr(trl, class_name)
    known = [field.name for field in dataclasses.fields(config_class) if field.init]
    unknown = [name for name in args if name not in known]
    if unknown:
        return [f"{where}.args.{name} is no argument of TRL's {class_name}.{_nearest(name, known)}" for name in unknown]
    types = {field.name: str(field.type) for field in dataclasses.fields(config_class)}
    texts = [
        name for name, value in args.items() if isinstance(value, str) and types[name] in ("int", "float", "bool", *NUMBERS)
    ]
    if texts:
        return [f"{where}.args.{name} is the text {args[name]!r}; TRL's {class_name} wants {types[name]}" for name in texts]
    try:
        config_class(**{"use_cpu": True, "bf16": False, "report_to": "none", "output_dir": "unused"} | args)
    except (TypeError, ValueError) as error:
        return [f"{where}.args is refused by TRL's {class_name}: {error}"]
    return []


def check_reward(name: str) -> str | None:
    """Return what is wrong with a reward function's name, or None."""
    import trl.rewards

    from tasks.jobs import rewards

    if name == "reward_model":
        return None
    ours = [n for n, f in vars(rewards).items() if callable(f) and getattr(f, "__module__", "") == rewards.__name__]
    known = [n for n in ours if not n.startswith("_") and n != "text_of"] + [f"trl.{n}" for n in trl.rewards.__all__]
    return None if name in known else f"there is no reward function {name!r}.{_nearest(name, known)}"


def check_tasks(names: list[str], folder: str | None, gate: list[str], digest: str | None = None) -> list[str]:
    """Return what is wrong with the names of lm-eval tasks, and with the gate's metrics of them.

    `digest` only tells one folder's answer from another's.
    """
    from tasks.jobs import harness

    try:
        manager = harness.find_tasks(names, Path(folder) if folder else None)
    except ValueError as error:
        return [str(error)]
    return harness.unjudgeable(gate, names, manager)


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""


if __name__ == "__main__":
    main()
