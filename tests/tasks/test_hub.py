"""What can be held of the hub's side without the hub: commits, folders of a snapshot, and the error where nothing answers."""

import os
import subprocess
import sys

import pytest

from tasks.errors import ProfileError
from tasks.hub import commit_of, data_folder


def test_commit_stands_for_itself_without_asking_the_hub():
    assert commit_of("recipe.base_model", "org/model", "a" * 40, "model") == "a" * 40


def test_hub_that_cannot_be_reached_is_named_with_the_way_out():
    """In a process of its own: offline mode is read when the hub's library is imported."""
    code = "from tasks.hub import commit_of\ntry: commit_of('recipe.base_model', 'org/model', 'main', 'model')\n"
    code += "except Exception as error: print(type(error).__name__, error)"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("MachineUnfit")
    assert "recipe.base_model" in done.stdout and "org/model" in done.stdout and "`path`" in done.stdout


def test_data_folder_is_the_one_that_holds_the_split(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train.json").touch()
    assert data_folder("recipe.datasets.sft", tmp_path, "train") == tmp_path / "data"


@pytest.mark.parametrize("folders", [[], ["a", "b"]], ids=["none", "two"])
def test_split_in_no_folder_or_in_several_is_refused_by_its_setting(folders, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.parquet").touch()
    with pytest.raises(ProfileError, match="recipe.datasets.sft.split"):
        data_folder("recipe.datasets.sft", tmp_path, "train")
