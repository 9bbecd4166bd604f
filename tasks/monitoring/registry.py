"""A profile's releases in MLflow's model registry: versions made of exports, and the aliases candidate, champion, previous.

MLflow holds a version's proof (manifest with every file's hash, certificate, parity, model card); the weights stay in the
store, where the version's tags find them. A registry on a server takes no local path as a version's source, so the source is
the folder `export` of the pipeline's MLflow run.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.schema import NAME
from tasks.artifacts import Artifact
from tasks.errors import ProfileError, ReleaseFailed
from tasks.monitoring import mlflow_runs

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
PROOF = "export"
PROOF_FILES = ("manifest.json", "certificate.json", "parity.json", "README.md", "config.json", "generation_config.json")


@dataclass(frozen=True)
class Version:
    """A version of a profile's registered model; `tags` name the export it is: fingerprint, digest, policy.fingerprint, …"""

    name: str
    number: int
    created: float
    mlflow_run_id: str
    tags: dict[str, str]

    @property
    def fingerprint(self) -> str:
        return self.tags["fingerprint"]

    def __str__(self) -> str:
        return f"version {self.number} of {self.name} (export {self.fingerprint}, run {self.tags['run_id']})"


def at(name: str, alias: str) -> Version | None:
    """Return the version that an alias of the profile's registered model points to, None if it points to none."""
    model = _model(name)
    return version(name, model.aliases.get(alias, "") if model else "")


def version(name: str, number: int | str) -> Version | None:
    """Return a version by its number; None for none. Raises ReleaseFailed for one that no run of the pipeline registered."""
    if not number:
        return None
    found = _version(mlflow_runs.client().get_model_version(name, str(number)))
    if "fingerprint" not in found.tags:
        raise ReleaseFailed(
            f"version {number} of {name} in MLflow's registry is of no export: someone registered it, or pointed an alias to "
            "it, by hand. Point the alias to a version that a run has made."
        )
    return found


def register(name: str, export: Artifact, mlflow_run_id: str, tags: dict[str, str]) -> Version:
    """Return the version of an export, made if there is none yet, and let `candidate` point to it; one process at a time."""
    client = mlflow_runs.client()
    if _model(name) is None:
        client.create_registered_model(name, description=f"Releases of the profile {name}.")
    key = f"name = '{name}' and tags.fingerprint = '{export.fingerprint}' and tags.digest = '{export.digest}'"
    found = list(client.search_model_versions(key))
    if not found:
        for file in (Path(export.path) / proof for proof in PROOF_FILES):
            if file.is_file():
                client.log_artifact(mlflow_run_id, str(file), PROOF)
        own = {"stage": export.stage, "fingerprint": export.fingerprint, "digest": export.digest, "path": export.path}
        source = f"runs:/{mlflow_run_id}/{PROOF}"
        found = [client.create_model_version(name, source, mlflow_run_id, tags=own | tags)]
    made = _version(min(found, key=lambda one: int(one.version)))
    point(made, CANDIDATE)
    return made


def point(version: Version, alias: str) -> None:
    """Let an alias point to a version: one write, so every reader sees the old version or the new one."""
    mlflow_runs.client().set_registered_model_alias(version.name, alias, str(version.number))


def tag(version: Version, tags: dict[str, Any]) -> None:
    for key, value in tags.items():
        mlflow_runs.client().set_model_version_tag(version.name, str(version.number), key, mlflow_runs.clean(value)[:5000])


def untag(version: Version, key: str) -> None:
    if key in version.tags:
        mlflow_runs.client().delete_model_version_tag(version.name, str(version.number), key)


def page(version: Version) -> str:
    """Return the version's page in MLflow."""
    return f"{mlflow_runs.pages()}/#/models/{version.name}/versions/{version.number}"


def refuse_name(name: str) -> None:
    """Raise ProfileError for what cannot be a profile's name: a path, or signs that MLflow's search takes for its own."""
    if not re.fullmatch(NAME, name):
        raise ProfileError(f"{name!r} is no profile's name. Give the `name:` that stands in the profile.")


def _model(name: str) -> Any | None:
    refuse_name(name)
    return next(iter(mlflow_runs.client().search_registered_models(f"name = '{name}'")), None)


def _version(found: Any) -> Version:
    return Version(found.name, int(found.version), found.creation_timestamp / 1000, found.run_id or "", dict(found.tags))
