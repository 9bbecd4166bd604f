"""The store only ever holds whole artifacts: what is damaged is not there, what fails leaves nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.artifacts import MANIFEST, Artifact, Store, hub_model, local_model
from tasks.errors import MachineUnfit, ProfileError

PROJECT = Path(__file__).resolve().parents[2]
KEY = "0123456789ab"
IDENTITY = {"stage": "sft", "recipe": {"seed": 1}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def fill(folder: Path, weights: str = "weights") -> None:
    (folder / "sub").mkdir()
    (folder / "adapter.safetensors").write_text(weights)
    (folder / "sub" / "config.json").write_text("{}")


def build(store: Store, weights: str = "weights", **facts) -> Artifact:
    with store.staging("sft", KEY) as staged:
        fill(staged, weights)
        return store.commit(staged, Artifact("sft", str(staged), KEY, "", **facts), IDENTITY)


def everything_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_artifact_committed_is_found_with_all_that_was_said_of_it(store):
    made = build(store, metrics={"loss": 0.5}, details={"rows": 3}, mlflow_run_id="run", seconds=1.5)
    found = store.find("sft", KEY)
    assert found == made
    assert (found.metrics, found.details, found.mlflow_run_id, found.seconds) == ({"loss": 0.5}, {"rows": 3}, "run", 1.5)
    assert (found / "adapter.safetensors").read_text() == "weights"
    assert Path(found.path) == store.place("sft", KEY)
    assert store.identity("sft", KEY) == IDENTITY


def test_artifact_never_built_is_not_found(store):
    assert store.find("sft", KEY) is None
    assert store.identity("sft", KEY) is None


def test_artifact_of_another_stage_or_key_is_not_found(store):
    build(store)
    assert store.find("grpo", KEY) is None
    assert store.find("sft", "ba9876543210") is None


def test_artifact_in_a_store_that_moved_is_found_there(store, tmp_path):
    build(store)
    store.root.rename(tmp_path / "moved")
    found = Store(tmp_path / "moved").find("sft", KEY)
    assert (found / "adapter.safetensors").is_file()


def test_artifact_digest_is_of_its_bytes_and_not_of_when_or_where_it_was_built(tmp_path):
    one, two, other = (build(Store(tmp_path / n), w, seconds=s) for n, w, s in (("1", "w", 1), ("2", "w", 2), ("3", "v", 1)))
    assert one.digest == two.digest != other.digest


def flip_a_byte(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    stamp = path.stat()
    path.write_text("weightz")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # neither size nor time tells


DAMAGE = {
    "altered": flip_a_byte,
    "truncated": lambda folder: os.truncate(folder / "adapter.safetensors", 3),
    "emptied": lambda folder: os.truncate(folder / "adapter.safetensors", 0),
    "deleted": lambda folder: (folder / "sub" / "config.json").unlink(),
    "added": lambda folder: (folder / "sub" / "extra.bin").write_text("x"),
    "renamed": lambda folder: (folder / "adapter.safetensors").rename(folder / "adapter.bin"),
    "manifest deleted": lambda folder: (folder / MANIFEST).unlink(),
    "manifest empty": lambda folder: (folder / MANIFEST).write_text(""),
    "manifest cut": lambda folder: os.truncate(folder / MANIFEST, 40),
    "manifest without files": lambda folder: (folder / MANIFEST).write_text('{"artifact": {}}'),
    "manifest of another form": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "manifest binary": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\x00\xfe"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_artifact_damaged_is_not_found_and_can_be_built_again(how, store):
    made = build(store)
    DAMAGE[how](Path(made.path))
    assert store.find("sft", KEY) is None
    assert build(store).digest == made.digest
    assert store.find("sft", KEY) is not None


def edited(change):
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return edit


MANGLED = {
    "files is a list": edited(lambda m: m.update(files=[])),
    "entry without a size": edited(lambda m: m["files"]["adapter.safetensors"].pop("size")),
    "no artifact": edited(lambda m: m.pop("artifact")),
    "another digest": edited(lambda m: m["artifact"].update(digest="0" * 12)),
    "unknown fact": edited(lambda m: m["artifact"].update(color="red")),
}


@pytest.mark.parametrize("how", MANGLED)
def test_artifact_with_a_mangled_manifest_is_not_found(how, store):
    MANGLED[how](Path(build(store).path))
    assert store.find("sft", KEY) is None


def test_staging_that_fails_leaves_nothing(store):
    with pytest.raises(KeyboardInterrupt), store.staging("sft", KEY) as staged:
        fill(staged)
        raise KeyboardInterrupt
    assert everything_below(store.root) == []
    assert list((store.root / "sft").iterdir()) == []


def test_staging_that_ends_without_a_commit_leaves_nothing(store):
    with store.staging("sft", KEY) as staged:
        fill(staged)
    assert store.find("sft", KEY) is None
    assert everything_below(store.root) == []


def test_staging_in_progress_is_not_found(store):
    with store.staging("sft", KEY) as staged:
        fill(staged)
        assert store.find("sft", KEY) is None


def test_two_builds_of_one_key_at_once_both_return_the_first(store):
    with store.staging("sft", KEY) as slow, store.staging("sft", KEY) as fast:
        assert slow != fast
        fill(slow, "later")
        fill(fast, "sooner")
        first = store.commit(fast, Artifact("sft", str(fast), KEY, ""), IDENTITY)
        second = store.commit(slow, Artifact("sft", str(slow), KEY, ""), IDENTITY)
    assert second == first
    assert (store.find("sft", KEY) / "adapter.safetensors").read_text() == "sooner"
    assert [p.name for p in (store.root / "sft").iterdir()] == [KEY]


BUILDER = """
import sys, time
from pathlib import Path
from tasks.artifacts import Artifact, Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(10_000):
    with store.staging("sft", str(number)) as staged:
        for name in "abcd":
            (staged / name).write_bytes(bytes([number % 256]) * 50_000)
        store.commit(staged, Artifact("sft", str(staged), str(number), ""), {"number": number})
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_builder_killed_at_any_moment_leaves_whole_artifacts_only(number, store, caplog):
    """Also in the middle of the rename: what has its name is whole, and what is not is built anew."""
    rng = random.Random(1)
    for _ in range(12):
        builder = subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(store.root)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
        )
        assert builder.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.1))
        builder.send_signal(number)
        builder.communicate()
        assert builder.returncode == -number
    built = sorted((path.name for path in store.root.glob("sft/[!.]*")), key=int)
    assert len(built) > 20
    for key in built:
        found = store.find("sft", key)
        assert found is not None and (found / "d").read_bytes() == bytes([int(key) % 256]) * 50_000
    assert "damaged" not in caplog.text
    assert store.find("sft", str(int(built[-1]) + 1)) is None


def test_commit_of_an_identity_without_canonical_form_is_refused_and_leaves_nothing(store):
    with pytest.raises((TypeError, ValueError)), store.staging("sft", KEY) as staged:
        fill(staged)
        store.commit(staged, Artifact("sft", str(staged), KEY, ""), {"when": object()})
    assert everything_below(store.root) == []


def test_store_where_no_folder_can_be_made_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineUnfit) as refused, Store(tmp_path / "file" / "store").staging("sft", KEY):
        pass
    assert str(tmp_path / "file") in str(refused.value) and "POSTTRAIN_HOME" in str(refused.value)


WITH_SMALL_FILES = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tasks.artifacts import Artifact, Store
from tasks.errors import MachineUnfit
store = Store(Path(sys.argv[2]))
try:
    with store.staging("sft", "k") as staged:
        (staged / "weights").write_text("w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        store.commit(staged, Artifact("sft", str(staged), "k", ""), {"stage": "sft"})
except MachineUnfit as error:
    print(error.exit_code, sys.argv[2] in str(error), "POSTTRAIN_HOME" in str(error))
"""


def test_commit_that_cannot_write_its_manifest_whole_is_refused_and_leaves_nothing(tmp_path):
    project = Path(__file__).parents[2]
    command = [sys.executable, "-c", WITH_SMALL_FILES, str(project), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["4", "True", "True"], done.stderr
    assert everything_below(tmp_path / "store") == []


def test_commit_on_a_full_disk_is_refused_and_leaves_nothing(small_disk):
    disk = small_disk(64)
    store = Store(disk / "store")
    with pytest.raises(MachineUnfit) as refused, store.staging("sft", KEY) as staged:
        with (staged / "weights").open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
            while True:
                file.write(b"w" * 4096)
        store.commit(staged, Artifact("sft", str(staged), KEY, ""), IDENTITY)
    assert str(disk) in str(refused.value)
    assert store.find("sft", KEY) is None
    assert everything_below(disk) == []


# --- base models ----------------------------------------------------------------------------------------------------------

WHOLE = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "w"}


def model(folder: Path, without: str = "", **more: str) -> Path:
    folder.mkdir()
    for name, text in (WHOLE | more).items():
        if name != without:
            (folder / name).write_text(text)
    return folder


def test_local_model_that_is_whole_is_identified_by_its_bytes(tmp_path):
    one, copy = local_model("m", model(tmp_path / "one")), local_model("m", model(tmp_path / "copy"))
    other = local_model("m", model(tmp_path / "other", **{"model.safetensors": "v"}))
    assert one.digest == copy.digest != other.digest
    assert Path(one.path).is_absolute()


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_local_model_with_weights_of_another_name_is_taken(name, tmp_path):
    assert local_model("m", model(tmp_path / "m", without="model.safetensors", **{name: "w"})).digest


@pytest.mark.parametrize(
    ("without", "said"), [("config.json", "config.json"), ("tokenizer.json", "tokenizer"), ("model.safetensors", "weights")]
)
def test_local_model_that_lacks_a_part_is_refused_by_it(without, said, tmp_path):
    path = model(tmp_path / "m", without=without)
    with pytest.raises(ProfileError) as refused:
        local_model("recipe.base_model", path)
    assert "recipe.base_model" in str(refused.value) and str(path) in str(refused.value) and said in str(refused.value)


def test_local_model_that_is_no_folder_is_refused_by_its_path(tmp_path):
    with pytest.raises(ProfileError, match=str(tmp_path / "gone")):
        local_model("recipe.base_model", tmp_path / "gone")


def test_hub_model_at_another_revision_is_another_input():
    here, there = Path("/here"), Path("/there")
    first = hub_model("org/m", "a" * 40, here)
    assert first.digest == hub_model("org/m", "a" * 40, there).digest
    assert first.digest != hub_model("org/m", "b" * 40, here).digest != hub_model("org/n", "b" * 40, here).digest
