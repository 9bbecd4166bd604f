"""The home folder is refused before a run when nothing could be kept there; the user's settings win over our defaults."""

import json
import os
import subprocess
import sys

import pytest

from tasks.environment import DEFAULTS, home, refuse_full_disk
from tasks.errors import MachineUnfit


def test_home_is_the_folder_that_the_environment_names(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "elsewhere"))
    assert home() == tmp_path / "elsewhere"
    monkeypatch.delenv("POSTTRAIN_HOME")
    monkeypatch.chdir(tmp_path)
    assert home() == tmp_path / "runs"


def test_home_with_room_is_accepted_and_left_empty(home):
    refuse_full_disk()
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("size_kib", [512, 32 * 1024], ids=["no room for a probe", "no room for a run"])
def test_home_on_a_disk_too_small_is_refused_with_the_way_out(size_kib, small_disk, monkeypatch):
    place = small_disk(size_kib) / "home"
    monkeypatch.setenv("POSTTRAIN_HOME", str(place))
    with pytest.raises(MachineUnfit) as refused:
        refuse_full_disk()
    assert str(place) in str(refused.value) and "POSTTRAIN_HOME" in str(refused.value)
    assert list(place.iterdir()) == []


def test_home_that_cannot_be_made_is_refused_with_the_way_out(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(MachineUnfit, match="POSTTRAIN_HOME"):
        refuse_full_disk()


def test_defaults_are_set_on_import_and_never_over_the_users_own():
    code = f"import os, json, tasks; print(json.dumps({{n: os.environ[n] for n in {sorted(DEFAULTS)}}}))"
    clean = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    for own in ({}, {"DO_NOT_TRACK": "0"}):
        done = subprocess.run([sys.executable, "-c", code], env=clean | own, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == DEFAULTS | own
