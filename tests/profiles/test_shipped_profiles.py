"""Every shipped profile is a test case by existing."""

from pathlib import Path

import pytest
import yaml

from profiles.load import InvalidProfile, accelerate_file, load, shipped
from profiles.schema import STAGES
from tasks.check_profile import check_limits

FOLDER = Path(__file__).parents[2] / "profiles"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ACCELERATE = sorted(path.stem for path in (FOLDER / "accelerate").glob("*.yaml"))


def test_shipped_names_are_the_yaml_files_beside_the_schema():
    assert sorted(shipped()) == NAMES
    assert "quickstart" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_loads_under_its_own_name(name):
    profile = load(name)
    assert profile.name == name
    assert profile.description.strip()


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_names_accelerate_files_that_exist(name):
    placement = load(name).placement
    for stage in STAGES:
        assert accelerate_file(placement.of(stage).accelerate).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_sets_only_limits_that_its_contracts_have(name):
    check_limits(load(name).recipe)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_loads_the_same_from_its_path(name):
    assert load(str(FOLDER / f"{name}.yaml")) == load(name)


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_file_starts_as_many_processes_as_its_name_says(name):
    """`<strategy>_<num_processes>`; a name without a number stands for one process."""
    spec = yaml.safe_load(accelerate_file(name).read_text())
    last = name.rsplit("_", 1)[-1]
    assert spec["num_processes"] == (int(last) if last.isdigit() else 1)


def test_accelerate_file_misspelt_is_refused_with_its_neighbour():
    with pytest.raises(InvalidProfile, match="single_gpu"):
        accelerate_file("single_gpus")
