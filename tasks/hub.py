"""What a recipe takes from the Hugging Face hub: every run is keyed on the commit, also where the profile follows a branch."""

import re
from pathlib import Path

from tasks.environment import home
from tasks.errors import MachineUnfit, ProfileError

COMMIT = re.compile(r"[0-9a-f]{40}")
ENDINGS = ("parquet", "jsonl", "json")


def commit_of(setting: str, repository: str, revision: str, repo_type: str) -> str:
    """Return the commit that `revision` stands for now; a commit stands for itself, without asking the hub.

    Raises ProfileError if the hub does not know it, MachineUnfit if the hub cannot be reached.
    """
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().repo_info(repository, revision=revision, repo_type=repo_type).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ProfileError(f"{setting} is {repository!r} at {revision!r}: the hub has no such {repo_type}. {error}") from None
    except Exception as error:  # offline mode, DNS, TLS and time-outs each have a class of their own, of three libraries
        raise MachineUnfit(_unreachable(setting, repository, error)) from error


def fetch_model(setting: str, repository: str, commit: str) -> Path:
    """Return a folder with a model's weights, config and tokenizer: safetensors only, no code."""
    from huggingface_hub import snapshot_download

    folder = home() / ".hub" / repository.replace("/", "--") / commit
    try:
        snapshot_download(
            repository,
            revision=commit,
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"],
            local_dir=folder,
        )
    except Exception as error:
        raise MachineUnfit(_unreachable(setting, repository, error)) from error
    return folder


def fetch_split(setting: str, repository: str, revision: str, split: str) -> Path:
    """Return a folder that holds exactly one split's data files of a dataset on the hub."""
    from huggingface_hub import snapshot_download

    commit = commit_of(setting, repository, revision, "dataset")
    folder = home() / ".hub" / repository.replace("/", "--") / commit / split
    try:
        patterns = [f"*{split}*.{ending}" for ending in ENDINGS]
        snapshot_download(repository, repo_type="dataset", revision=commit, allow_patterns=patterns, local_dir=folder)
    except Exception as error:
        raise MachineUnfit(_unreachable(setting, repository, error)) from error
    return data_folder(setting, folder, split)


def data_folder(setting: str, folder: Path, split: str) -> Path:
    """Return the one folder below `folder` that has data files, as hub datasets keep them in `data/` or a config's folder."""
    found = {path.parent for ending in ENDINGS for path in folder.rglob(f"*.{ending}") if ".cache" not in path.parts}
    if len(found) != 1:
        names = ", ".join(sorted(str(path.relative_to(folder)) for path in found)) or "none"
        raise ProfileError(f"{setting}.split is {split!r}: its files must lie in one folder of the dataset (found: {names}).")
    return found.pop()


def _unreachable(setting: str, repository: str, error: Exception) -> str:
    return (
        f"{setting} is {repository!r} on the Hugging Face hub, which does not answer: {type(error).__name__}: {error}. "
        "Where there is no way out to the hub, put a copy on disk and name it with `path`."
    )
