"""The workflows run on another machine: here they are read, and the retrain's shell is run with a `posttrain` that fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))


def steps(name: str) -> list[dict]:
    content = yaml.safe_load((PROJECT / ".github" / "workflows" / name).read_text())
    return [step for job in content["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_has_a_time_limit_and_reads_the_pinned_sets(path):
    content = yaml.safe_load(path.read_text())
    assert all(job["timeout-minutes"] for job in content["jobs"].values())
    assert "pip install" not in path.read_text()


@pytest.fixture
def retrain(tmp_path):
    """Run the last step of retrain.yml, as the runner does, with a `posttrain` that says how it was called and exits with 6."""
    fake = tmp_path / ".venv" / "bin" / "posttrain"
    fake.parent.mkdir(parents=True)
    fake.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\nsys.exit(6)\n")
    fake.chmod(0o755)

    def run(**env: str) -> subprocess.CompletedProcess:
        script = steps("retrain.yml")[-1]["run"]
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)

    return run


def test_retrain_passes_profile_and_each_override_on_and_the_exit_code_back(retrain):
    done = retrain(PROFILE="quickstart-dpo", OVERRIDES="recipe.seed=3\nrecipe.policy.args.beta=0.2\n")
    wanted = ["run", "quickstart-dpo", "--deployment", "ci", "--wait"]
    wanted += ["--set", "recipe.seed=3", "--set", "recipe.policy.args.beta=0.2"]
    assert done.returncode == 6 and done.stdout.strip() == str(wanted)


def test_retrain_without_overrides_sets_nothing(retrain):
    assert retrain(PROFILE="quickstart", OVERRIDES="").stdout.strip().endswith("'--wait']")


def test_retrain_override_is_data_and_never_a_command(retrain, tmp_path):
    done = retrain(PROFILE="quickstart", OVERRIDES='description="$(touch pwned)"; touch pwned')
    assert done.returncode == 6 and not (tmp_path / "pwned").exists()
