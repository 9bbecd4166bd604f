"""`posttrain lineage`: from a run's export, or a folder of the store or copied from it, back to rows, base, code, versions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.artifacts import Store, damage
from tasks.environment import home
from tasks.errors import ProfileError
from tasks.fingerprints import tree_digest
from tasks.pipeline_run import run_of, store
from tasks.remote_store import MANIFEST


@dataclass(frozen=True)
class Node:
    """One thing that the artifact is made of: `what` names it, `facts` say where from, `state` is what its files are now.

    `state` is `whole`, `not here`, or what is wrong with the files.
    """

    role: str
    what: str
    state: str
    facts: dict[str, Any] = field(default_factory=dict)
    made_of: tuple["Node", ...] = ()


def lineage(what: str) -> Node:
    """Return the tree behind a run's last artifact or a folder; raises ProfileError if there is no such thing."""
    folder = find(what)
    return _node("", json.loads((folder / MANIFEST).read_text()), folder, dict(_by_digest(store())))


def find(what: str) -> Path:
    """Return the folder of an artifact: the one that is named, or what a run came to last."""
    if (Path(what) / MANIFEST).is_file():
        return Path(what).resolve()
    for folder in sorted(home().glob(f"*/{what}/profile.json")) or sorted((home() / what).glob("*/profile.json"), reverse=True):
        made = [r for r in run_of(folder.parent).records() if r.artifact and (Path(r.artifact) / MANIFEST).is_file()]
        for stage in ("export", "merge"):
            if found := [r for r in made if r.stage == stage]:
                return Path(found[-1].artifact)
        if made:
            return Path(made[-1].artifact)
    raise ProfileError(
        f"{what!r} is no folder with a {MANIFEST}, and {home()} has no run and no profile of that name that came to an "
        "artifact. Name a run's id, a profile, or the folder that is served."
    )


def roots(node: Node) -> Iterator[Node]:
    """Yield the node and everything below it, each once."""
    seen: set[str] = set()
    todo = [node]
    while todo:
        node = todo.pop(0)
        if node.what not in seen:
            seen.add(node.what)
            yield node
            todo += node.made_of


def _by_digest(store: Store) -> Iterator[tuple[str, Path]]:
    """Yield the store's artifacts by their digest, and the folders in them that are base models by theirs."""
    for path in store.root.glob(f"[!.]*/[!.]*/{MANIFEST}"):
        manifest = json.loads(path.read_text())
        yield manifest["artifact"]["digest"], path.parent
        for config in {Path(name).parent for name in manifest["files"] if Path(name).name == "config.json"} - {Path()}:
            yield tree_digest(path.parent / config), path.parent / config


def _node(role: str, manifest: dict[str, Any], folder: Path, known: dict[str, Path]) -> Node:
    artifact, identity = manifest["artifact"], manifest["identity"]
    inputs = {name: digest for name, digest in identity.get("inputs", {}).items() if digest}
    sources = artifact["details"].get("made_of", {})
    children = tuple(_input(name, digest, sources.get(name, ""), known) for name, digest in inputs.items())
    facts = {"digest": artifact["digest"], "path": str(folder)} | _facts(artifact, identity)
    return Node(role, f"{artifact['stage']}/{artifact['fingerprint']}", damage(folder) or "whole", facts, children)


def _facts(artifact: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    details, recipe = artifact["details"], identity.get("recipe", {})
    facts = {"code": identity["code"][:12]} if "code" in identity else {}
    facts |= {"seed": recipe["seed"]} if "seed" in recipe else {}
    if contract := details.get("contract"):
        facts |= {"rows": contract["n_rows"], "contract": contract["kind"], "set aside": contract["n_set_aside"]}
    if origin := details.get("origin"):
        facts["from"] = next((f"{kind}:{origin[kind]}" for kind in ("hub", "path", "prepared") if origin.get(kind)), "")
    if artifact.get("mlflow_run_id"):
        facts["mlflow run"] = artifact["mlflow_run_id"]
    return facts | {"libraries": identity["libraries"]} if "libraries" in identity else facts


def _input(role: str, digest: str, source: str, known: dict[str, Path]) -> Node:
    """Return the node of an input, found in the store by its digest, or told from where it was read."""
    if (folder := known.get(digest)) is None:
        return Node(role, source or f"{role} {digest[:12]}", _outside(source, digest), {"digest": digest})
    if (folder / MANIFEST).is_file():
        return _node(role, json.loads((folder / MANIFEST).read_text()), folder, known)
    manifest = json.loads((folder.parent / MANIFEST).read_text())
    inside = _node(role, manifest, folder.parent, known)
    return Node(role, f"{inside.what}/{folder.name}", inside.state, {"digest": digest} | inside.facts, inside.made_of)


def _outside(source: str, digest: str) -> str:
    """Return what is known of an input that is not in the store: whether its bytes are still those that were read."""
    path = Path(source)
    if not source or source.startswith("hub:") or not path.exists():
        return "not here"
    return "whole" if tree_digest(path) == digest else "has other bytes now"
