"""Which export `posttrain serve` finds, and that it serves none whose files are not those that were tested."""

import json
from pathlib import Path

import pytest

from flows.serving import example, find_export, serve
from profiles.load import load
from tasks.artifacts import Artifact
from tasks.errors import MachineUnfit, ProfileError
from tasks.pipeline_run import store

FLAGS = "--dtype float32 --max-model-len 64"


def exported(key: str) -> Path:
    """An export in the store, as its job leaves it."""
    identity = {"recipe": {"card": {"profile": "quickstart"}, "startup_timeout_seconds": 9}}
    with store().staging("export", key) as staged:
        (staged / "model.safetensors").write_text(key)
        (staged / "tokenizer_config.json").write_text("{}")
        made = store().commit(staged, Artifact("export", "", key, "", details={"serve": FLAGS}), identity)
    return Path(made.path)


def ran(home: Path, run_id: str, key: str | None, exit_code: int = 0) -> None:
    """A finished run's folder, of one that came to this export."""
    folder = home / "quickstart" / run_id
    folder.mkdir(parents=True)
    stages = [{"stage": "export", "fingerprint": key}] if key else []
    summary = {"profile": "quickstart", "export": key, "exit_code": exit_code, "stages": stages}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "profile.json").write_text(load("quickstart").model_dump_json())


def test_newest_finished_run_of_a_profile_a_run_and_a_folder_name_their_export(home):
    for number, key in enumerate(("a", "b")):
        folder = exported(key)
        ran(home, f"2026010{number}", key)
    ran(home, "20260102", None)  # stopped before its export
    ran(home, "20260103", "b", exit_code=7)
    assert find_export("quickstart").fingerprint == "b"
    assert find_export("20260100").names == ["quickstart", "quickstart@a"]
    found = find_export(str(folder))
    assert (found.fingerprint, found.flags, found.startup_timeout_seconds) == ("b", FLAGS.split(), 9)
    assert "/v1/completions" in example(found, 8000)


@pytest.mark.parametrize("what", ["nobody", "20260102", "nobody@champion", "/tmp"])
def test_what_names_no_export_is_refused(home, what):
    ran(home, "20260102", None)
    with pytest.raises(ProfileError):
        find_export(what)


def test_altered_export_is_not_served(home):
    (exported("a") / "model.safetensors").write_text("A")
    ran(home, "20260100", "a")
    with pytest.raises(MachineUnfit, match="not the export that was tested"):
        find_export("quickstart")


def test_only_a_champion_can_be_followed(home):
    with pytest.raises(ProfileError, match="never changes"):
        serve("quickstart", 8000, follow=True)
