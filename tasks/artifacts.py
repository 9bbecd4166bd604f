"""What a stage leaves: files, a manifest and a fingerprint, in a content-addressed store that only ever holds whole ones."""

import contextlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tasks import hub
from tasks.errors import JobFailed, MachineUnfit, ProfileError
from tasks.fingerprints import canonical, file_digest, fingerprint, tree_digest
from tasks.remote_store import MANIFEST, RemoteStore

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
log = logging.getLogger("posttrain")


@dataclass(frozen=True)
class Artifact:
    """A finished stage's files: `path` is a folder here, or an address in the remote store; `digest` identifies its bytes.

    Downstream stages key on `digest`, not on `fingerprint`: a rebuilt input with other bytes rebuilds what follows.
    """

    stage: str
    path: str
    fingerprint: str
    digest: str
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    mlflow_run_id: str | None = None
    seconds: float = 0.0

    def __truediv__(self, name: str) -> Path:
        return Path(self.path) / name

    @property
    def source(self) -> str:
        """What a person finds it by: its place in the store, its address on the hub, or the path where it was read."""
        if "hub" in self.details:
            return f"hub:{self.details['hub']}@{self.details['commit']}"
        return self.path if self.stage in ("base_model", "task_folder") else f"{self.stage}/{self.fingerprint}"


class Store:
    """`<root>/<stage>/<fingerprint>/`: written beside, hashed into a manifest, renamed into place.

    With a `remote` every artifact is also copied there, and what is not here is found there.
    """

    def __init__(self, root: Path, remote: RemoteStore | None = None):
        self.root = root
        self.remote = remote

    def id(self) -> str:
        """Return what two processes compare to know that they share this store."""
        if self.remote is not None:
            return self.remote.id()
        path = self.root / ".id"
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                mine = self.root / f".id.{uuid.uuid4().hex}"
                mine.write_text(mine.suffix[1:])
                with contextlib.suppress(FileExistsError):
                    os.link(mine, path)  # whole at once: nobody reads an empty one
                mine.unlink()
            return path.read_text()

    def place(self, stage: str, key: str) -> Path:
        """Return where the artifact of `stage` with fingerprint `key` is, or would be, on this machine."""
        return self.root / stage / key

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the artifact if it is there and every file has the size and hash of its manifest, else None.

        A damaged artifact is not believed, with a warning; the build that follows replaces it. One that is only in the
        remote store is judged by its sizes; whoever copies it from there checks the hashes.
        """
        if (here := self._find_here(stage, key)) is not None:
            return here
        manifest = self.remote.manifest(stage, key) if self.remote else None
        return self._there(manifest) if manifest else None

    def fetch(self, artifact: Artifact) -> Artifact:
        """Return the artifact with its files on this machine; raises JobFailed if what is there is not what was made."""
        if not self._is_remote(artifact):
            return artifact
        stage, key = artifact.stage, artifact.fingerprint
        here = self._find_here(stage, key) or self._copy_here(stage, key)
        if not self._is_build(here, artifact.digest):
            raise self._other_build(here, artifact.digest)
        return here

    def reference(self, artifact: Artifact) -> str:
        """Return a name for an input that `resolve` understands on any machine that has this store, and bring it there.

        Raises MachineUnfit if the store has another build of it.
        """
        if "hub" in artifact.details:
            return f"hub:{artifact.details['hub']}@{artifact.details['commit']}"
        stage, key = artifact.stage, artifact.fingerprint
        if self._is_remote(artifact):
            return f"store:{stage}/{key}"
        if (path := Path(artifact.path)).is_relative_to(self.root):
            inside = path.relative_to(self.root)
            if self.remote is not None:  # it may be older than the remote store
                self._share_older(*inside.parts[:2])
            return f"store:{inside.as_posix()}"
        if self.remote is None:
            return f"path:{artifact.path}"
        if self.remote.manifest(stage, key) is None:
            with self.staging(stage, key) as staged:
                with disk_errors(self.root):
                    shutil.copytree(artifact.path, staged, dirs_exist_ok=True)
                self.commit(staged, artifact, {"digest": artifact.digest})
        return f"store:{stage}/{key}"

    def resolve(self, reference: str, digest: str) -> str:
        """Return the files behind a reference on this machine; raises MachineUnfit if they are not those of `digest`."""
        kind, name = reference.split(":", 1)
        if kind == "hub":
            return str(hub.fetch_model("recipe.base_model", *name.split("@")))
        if kind == "path":
            path = Path(name)
            if not path.exists() or tree_digest(path) != digest:
                what = "is not on this machine" if not path.exists() else "has other bytes on this machine"
                raise MachineUnfit(
                    f"the input {name} {what}: put the same files there, or set POSTTRAIN_STORE to what all machines reach."
                )
            return name
        stage, key, *inside = name.split("/")
        found = self.find(stage, key)
        if found is None:
            where = self.remote.url if self.remote else self.root
            raise MachineUnfit(f"the input {stage}/{key} is not in the store that this machine sees, {where}.")
        path = Path(self.fetch(found).path).joinpath(*inside)
        is_ordered = not inside and self._is_build(found, digest)
        if not is_ordered and tree_digest(path) != digest:  # the digest of a base model in the store is its folder's
            raise self._other_build(found, digest)
        return str(path)

    @contextmanager
    def staging(self, stage: str, key: str) -> Iterator[Path]:
        """Yield an empty folder on the store's own file system; whatever was not committed is removed afterwards."""
        folder = self.root / stage / f".{key}.{uuid.uuid4().hex[:8]}"
        with disk_errors(self.root):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, staged: Path, artifact: Artifact, identity: dict[str, Any]) -> Artifact:
        """Write the manifest and rename `staged` into place; the first of two equal builds wins."""
        with disk_errors(self.root):
            files = {name: _entry(staged / name) for name in _names(staged)}
            digest = digest_of({name: entry["sha256"] for name, entry in files.items()})
            target = self.place(artifact.stage, artifact.fingerprint)
            facts = asdict(artifact) | {"path": str(target), "digest": digest}
            _write_synced(staged / MANIFEST, {"artifact": facts, "identity": identity, "files": files})
            _move_into_place(staged, target)
            made = _read(target)
        return made if self.remote is None else self._share(made)

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return an artifact's manifest, its files not looked at; None if the store does not have it."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.place(stage, key) / MANIFEST).read_text())
        return self.remote.manifest(stage, key) if self.remote else None

    def identity(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return what was fingerprinted for an artifact, or None if the store does not have it."""
        with contextlib.suppress(KeyError, TypeError):
            return self.manifest(stage, key)["identity"]
        return None

    def _find_here(self, stage: str, key: str) -> Artifact | None:
        folder = self.place(stage, key)
        if not folder.exists():
            return None
        if (problem := damage(folder)) is None:
            return _read(folder)
        log.warning("%s/%s in the store is damaged (%s): it will be built again", stage, key, problem)
        return None

    def _is_remote(self, artifact: Artifact) -> bool:
        return self.remote is not None and artifact.path.startswith(f"{self.remote.url}/")

    def _there(self, manifest: dict[str, Any]) -> Artifact:
        """Return the artifact of a manifest in the remote store."""
        facts = manifest["artifact"]
        address = self.remote.address(facts["stage"], facts["fingerprint"])
        try:
            return Artifact(**facts | {"path": address})
        except TypeError as error:
            raise MachineUnfit(
                f"{address} was left by another version of posttrain ({error}). Install the same one on every machine that "
                f"uses the store, or remove {address}/{MANIFEST}: then it is built again."
            ) from None

    def _share(self, made: Artifact) -> Artifact:
        """Leave an artifact in the remote store too; of two builds on two machines the first one there is returned."""
        try:
            kept = self._there(self.remote.push(Path(made.path), made.stage, made.fingerprint))
        except MachineUnfit as error:
            raise MachineUnfit(f"{error} What was built is whole on this machine, in {made.path}.", error.cause) from error
        if kept.digest == made.digest:
            return made
        log.warning("%s was built on another machine first: that one is taken, and %s removed", kept.path, made.path)
        shutil.rmtree(made.path)
        return kept

    def _share_older(self, stage: str, key: str) -> None:
        """Leave in the remote store what was built before there was one; raises MachineUnfit if it has another build."""
        here = _read(self.place(stage, key))
        kept = self._there(self.remote.push(Path(here.path), stage, key))
        if kept.digest != here.digest:
            raise self._other_build(kept, here.digest)

    def _is_build(self, found: Artifact, digest: str) -> bool:
        if found.digest == digest:
            return True
        identity = self.identity(found.stage, found.fingerprint)  # of a copied base model it has the digest of its folder
        return identity is not None and identity.get("digest") == digest

    def _other_build(self, found: Artifact, digest: str) -> MachineUnfit:
        stage, key = found.stage, found.fingerprint
        return MachineUnfit(
            f"{found.path} is another build of {stage}/{key} than the run goes on from, that of the digest {digest}. "
            f"Remove {self.place(stage, key)} on the machine that has the older one, and start the run again."
        )

    def _copy_here(self, stage: str, key: str) -> Artifact:
        target = self.place(stage, key)
        with self.staging(stage, key) as staged, disk_errors(self.root):
            self.remote.pull(stage, key, staged)
            if problem := damage(staged):
                self.remote.forget(stage, key)
                raise JobFailed(
                    f"{self.remote.address(stage, key)} is damaged ({problem}) and was taken out of the store: the next run "
                    "builds it again."
                )
            _move_into_place(staged, target)
        return _read(target)


def digest_of(files: dict[str, str]) -> str:
    """Return the one digest of an artifact's files, given each one's SHA-256."""
    return fingerprint({"files": files})


def damage(folder: Path) -> str | None:
    """Return what is wrong with an artifact's folder against its manifest, or None if all of it holds."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if Artifact(**manifest["artifact"]).digest != digest_of({name: sha for name, (_, sha) in files.items()}):
            return "its digest is not that of its files"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest unreadable: {type(error).__name__}: {error}"
    present = set(_names(folder))
    for name, (size, sha) in files.items():
        path = folder / name
        if name not in present:
            return f"{name} is missing"
        if path.stat().st_size != size or file_digest(path) != sha:
            return f"{name} was altered"
    extra = present - set(files)
    return f"{min(extra)} was added" if extra else None


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says so."""
    try:
        yield
    except OSError as error:
        raise MachineUnfit(
            f"cannot write under {root}: {error.strerror or error}. Nothing half-written was kept. "
            "Free space there, or set POSTTRAIN_HOME to a folder on another disk."
        ) from error


def _move_into_place(staged: Path, target: Path) -> None:
    """Rename a whole artifact to its place; what is whole there already stays, for someone may be reading it."""
    if target.exists() and damage(target) is not None:
        shutil.rmtree(target)
    try:
        os.rename(staged, target)
    except OSError:
        if damage(target) is not None:
            raise


def local_model(setting: str, path: Path) -> Artifact:
    """Return a local base model as an input, identified by its bytes; raises ProfileError naming what is missing."""
    refuse_unusable_model(setting, path)
    digest = tree_digest(path)
    return Artifact(stage="base_model", path=str(path.resolve()), fingerprint=digest[:12], digest=digest)


def task_folder(path: Path) -> Artifact:
    """Return a folder of lm-eval tasks as an input, identified by its bytes; raises ProfileError if there is none."""
    if not path.is_dir():
        raise ProfileError(f"recipe.evaluate.task_folder is {str(path)!r}: there is no such folder (looked from {Path.cwd()}).")
    digest = tree_digest(path)
    return Artifact("task_folder", str(path.resolve()), digest[:12], digest)


def refuse_unusable_model(setting: str, path: Path) -> None:
    """Raise ProfileError if a folder lacks what every stage loads from a base model."""
    problem = _model_problem(path)
    if problem:
        raise ProfileError(
            f"{setting} is {str(path)!r}, which {problem}. Every stage loads the base model from there. "
            "Name a folder made by save_pretrained() of both the model and its tokenizer."
        )


def hub_model(repository: str, commit: str, path: Path) -> Artifact:
    """Return a hub model's snapshot at `path` as an input, identified by its repository and commit."""
    digest = fingerprint({"hub": repository, "commit": commit})
    return Artifact("base_model", str(path), digest, digest, details={"hub": repository, "commit": commit})


def _model_problem(path: Path) -> str | None:
    if not path.is_dir():
        return "is not a folder"
    if not (path / "config.json").is_file():
        return "has no config.json"
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return "has no tokenizer (no tokenizer.json, tokenizer.model or vocab.json)"
    if not any(any(path.glob(pattern)) for pattern in WEIGHTS):
        return f"has no weights ({' or '.join(WEIGHTS)})"
    return None


def _names(folder: Path) -> list[str]:
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def _read(folder: Path) -> Artifact:
    facts = json.loads((folder / MANIFEST).read_text())["artifact"]
    return Artifact(**facts | {"path": str(folder)})


def _write_synced(path: Path, content: dict[str, Any]) -> None:
    canonical(content["identity"])
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
