"""From a profile's name and `--set` overrides to a checked Profile, or one error that says what is wrong."""

import difflib
import logging
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from profiles.contradictions import contradictions
from profiles.schema import METHODS, Profile

log = logging.getLogger("posttrain")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML reads 1e-4 as text, which TRL would only trip over when the optimizer steps."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
ORIGINS = ("path", "hub", "prepared")
# their keys are another library's, or a metric's name, checked later
FREE_KEYS = ("args", "config", "contract", "columns", "env", "signals", "change", "floors", "not_worse")


class InvalidProfile(ValueError):
    """The profile cannot be loaded; the text names each setting, its value and the way out."""


def shipped() -> list[str]:
    """Return the names of the profiles that come with the project."""
    return sorted(p.name.removesuffix(".yaml") for p in files("profiles").iterdir() if p.name.endswith(".yaml"))


def load(name: str, overrides: list[str] | None = None) -> Profile:
    """Return the profile `name` (a shipped one, or the path of a YAML file) with `key.path=value` overrides applied.

    Raises InvalidProfile for a missing file, an unknown key, a wrong type or two settings that contradict each other.
    """
    raw = _read(name)
    # another method drops the old one's settings, so it comes first: the settings given with it are the new one's
    for override in sorted(overrides or [], key=lambda text: not text.startswith("recipe.policy.method=")):
        raw = _override(raw, override)
    try:
        profile = Profile.model_validate(raw)
    except ValidationError as error:
        raise InvalidProfile(_explain(name, error)) from None
    if found := contradictions(profile):
        raise InvalidProfile(f"profile {profile.name}: " + "\n".join(found))
    return profile


def accelerate_file(name: str) -> Path:
    """Return the path of profiles/accelerate/<name>.yaml; raises InvalidProfile with the ones that exist."""
    path = Path(str(files("profiles"))) / "accelerate" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise InvalidProfile(f"placement accelerate is {name!r}, no file of profiles/accelerate.{_nearest(name, known)}")
    return path


def _read(name: str, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = _locate(name)
    if path in below:
        raise InvalidProfile(f"profile {path} extends itself: {' → '.join(p.stem for p in (*below, path))}. Break the circle.")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidProfile(f"profile {path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidProfile(f"profile {path} holds {type(raw).__name__}, not a mapping with description and recipe")
    parent = raw.pop("extends", None)
    raw.setdefault("name", path.stem)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise InvalidProfile(f"profile {path}: extends is {parent!r}; it takes the name of one profile, or a YAML file's path.")
    return _merge(_read(_beside(path, parent), (*below, path)), raw)


def _locate(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise InvalidProfile(f"no profile file at {name!r} (looked from {Path.cwd()})")
    path = Path(str(files("profiles"))) / f"{name}.yaml"
    if not path.is_file():
        raise InvalidProfile(
            f"no profile named {name!r}.{_nearest(name, shipped())} "
            "A profile of your own is named by its path, ending in .yaml."
        )
    return path


def _beside(path: Path, parent: str) -> str:
    own = path.parent / f"{parent}.yaml"
    return str(own) if own.is_file() else parent


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` overlaid with `above`, block by block.

    A block of another `method` replaces the old one whole; another origin (path, hub, prepared) replaces the old origin.
    """
    merged = dict(below)
    if named := [key for key in ORIGINS if above.get(key)]:
        gone = {*ORIGINS, *(() if "hub" in named else ("revision",))}
        merged = {key: value for key, value in below.items() if key not in gone}
    for key, value in above.items():
        old = merged.get(key)
        same = isinstance(old, dict) and isinstance(value, dict) and value.get("method", old.get("method")) == old.get("method")
        merged[key] = _merge(old, value) if same else value
    return merged


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise InvalidProfile(f"--set {override!r} has no '='. Write --set key.path=value.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    path = key.split(".")
    _check_path(path)
    if path == ["recipe", "policy", "method"] and value != raw.get("recipe", {}).get("policy", {}).get("method"):
        log.warning(
            "--set %s: the settings of the profile's own method are dropped; give the new one's with --set too", override
        )
    nested: Any = value
    for part in reversed(path):
        nested = {part: nested}
    return _merge(raw, nested)


def _check_path(path: list[str]) -> None:
    """Refuse a path that no profile can have; keys below args, config and contract belong to other libraries."""
    models: list[type[BaseModel]] = [Profile]
    for depth, part in enumerate(path):
        if depth and path[depth - 1] in FREE_KEYS:
            return
        known = sorted({name for model in models for name in model.model_fields})
        if part not in known:
            where = ".".join(path[:depth]) or "a profile"
            raise InvalidProfile(f"--set {'.'.join(path)}: {where} has no key {part!r}.{_nearest(part, known)}")
        models = [m for model in models if part in model.model_fields for m in _models(model.model_fields[part].annotation)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _explain(name: str, error: ValidationError) -> str:
    return f"profile {name} is not valid:\n" + "\n".join(f"  {_line(item)}" for item in error.errors())


def _line(item: Any) -> str:
    path = [str(part) for part in item["loc"] if part not in METHODS]
    where, value = ".".join(path), item["input"]
    if item["type"] == "extra_forbidden":
        return f"{where} is not a setting.{_nearest(path[-1], _siblings(path[:-1]))}"
    if item["type"] == "missing":
        return f"{where} is missing."
    said = item["msg"].removeprefix("Value error, ")
    if said.startswith("."):  # the validator went into the block and names the setting inside it
        return where + said
    shown = "" if isinstance(value, dict | BaseModel) else f" is {value!r}"
    return f"{where}{shown}: {said}"


def _siblings(path: list[str]) -> list[str]:
    models: list[type[BaseModel]] = [Profile]
    for part in path:
        models = [
            m for model in models if part in model.model_fields for m in _models(model.model_fields[part].annotation)
        ] or models
    return sorted({name for model in models for name in model.model_fields})


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else f" There is: {', '.join(known)}."
