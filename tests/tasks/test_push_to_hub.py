"""A push against a program that speaks the hub's HTTP API: the files that arrive, and a token that stays where it is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOKEN = "hf_secret_of_this_test"
PUSH = """
import sys
from profiles.schema import HubRepository
from tasks.errors import ReleaseFailed
from tasks.push_to_hub import push
try:
    print(push(sys.argv[1], HubRepository(repo="org/model"), "mine, version 1"))
except ReleaseFailed as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub(tmp_path) -> Iterator[tuple[str, Path]]:
    """The address of a hub, and the folder that its repositories are in."""
    program = Path(__file__).with_name("hub_server.py")
    command = [sys.executable, program, tmp_path / "hub", TOKEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}", tmp_path / "hub"
        server.kill()


def push(address: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    """Push in a process of its own: the hub's address is read when its library is imported."""
    changed = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env
    return subprocess.run([sys.executable, "-P", "-c", PUSH, folder], env=changed, capture_output=True, text=True)


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    return folder


def test_every_file_of_the_export_arrives_as_it_is_in_one_private_commit(hub, export):
    address, repositories = hub
    done = push(address, export, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stdout.strip()) == (0, f"{1:040d}"), done.stdout + done.stderr
    for file in export.iterdir():
        assert (repositories / "org" / "model" / file.name).read_bytes() == file.read_bytes()
    assert (repositories / "org" / "model" / ".visibility").read_text() == "private"
    assert TOKEN not in done.stdout + done.stderr


def test_second_push_is_one_more_commit_that_takes_away_what_is_no_part_of_the_release(hub, export):
    address, repositories = hub
    push(address, export, HF_TOKEN=TOKEN)
    (export / "config.json").rename(export / "settings.json")
    done = push(address, export, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stdout.strip()) == (0, f"{2:040d}"), done.stdout + done.stderr
    there = {path.name for path in (repositories / "org" / "model").iterdir() if not path.name.startswith(".")}
    assert there == {path.name for path in export.iterdir()}


def test_repository_that_is_public_gets_no_private_weights(hub, export):
    address, repositories = hub
    there = repositories / "org" / "model"
    there.mkdir(parents=True)
    (there / ".visibility").write_text("public")
    done = push(address, export, HF_TOKEN=TOKEN)
    assert done.returncode == 7 and "is public" in done.stdout and "private" in done.stdout
    assert [path.name for path in there.iterdir()] == [".visibility"]


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f" {TOKEN}\r\n"])
def test_token_with_a_line_end_as_secrets_come_is_taken_without_it(token, hub, export):
    done = push(hub[0], export, HF_TOKEN=token)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("token", ["hf_two words", "hf_a\nhf_b", "hf_ä", " \n"])
def test_token_that_can_be_none_is_refused_and_not_repeated(token, export):
    done = push("http://127.0.0.1:9", export, HF_TOKEN=token)
    assert done.returncode == 7 and "the token alone" in done.stdout
    assert token.strip() == "" or token.split()[0] not in done.stdout + done.stderr


def test_hub_that_refuses_the_token_is_said_so_without_the_token(hub, export):
    done = push(hub[0], export, HF_TOKEN="hf_wrong_one")
    assert done.returncode == 7 and "org/model" in done.stdout and "401" in done.stdout
    assert "hf_wrong_one" not in done.stdout + done.stderr


def test_hub_that_is_away_is_named(export):
    done = push("http://127.0.0.1:9", export, HF_TOKEN=TOKEN)
    assert done.returncode == 7 and "did not take it" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
