"""The store that machines share, as a folder (file://): two machines are two roots with nothing in common but the address.

tests/server/test_s3_store.py holds a bucket to the same.
"""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.artifacts import MANIFEST, Artifact, Store, hub_model, local_model
from tasks.errors import JobFailed, MachineUnfit
from tasks.remote_store import RemoteStore

PROJECT = Path(__file__).parents[2]
KEY = "0123456789ab"
FILES = {"adapter.safetensors": "weights", "sub/deep/a b #1.json": "{}", "sub/empty": ""}
IDENTITY = {"stage": "sft", "recipe": {"seed": 1}}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "a shared disk"


@pytest.fixture
def machines(shared: Path, tmp_path: Path) -> tuple[Store, Store]:
    return Store(tmp_path / "one", RemoteStore(f"file://{shared}")), Store(tmp_path / "two", RemoteStore(f"file://{shared}"))


def build(store: Store, weights: str = "weights", key: str = KEY, **facts) -> Artifact:
    with store.staging("sft", key) as staged:
        for name, text in (FILES | {"adapter.safetensors": weights}).items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_text(text)
        return store.commit(staged, Artifact("sft", str(staged), key, "", **facts), IDENTITY)


def contents(artifact: Artifact) -> dict[str, str]:
    folder = Path(artifact.path)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    return {name: (folder / name).read_text() for name in names}


def only(shared: Path, name: str) -> Path:
    (path,) = shared.rglob(name)
    return path


def lose(store: Store) -> None:
    """The machine lost its disk."""
    store.root.rename(store.root.with_name("lost"))


def test_artifact_built_on_one_machine_is_found_and_fetched_whole_on_another(machines):
    one, two = machines
    made = build(one, metrics={"loss": 0.5}, details={"rows": 3}, mlflow_run_id="run", seconds=1.5)
    found = two.find("sft", KEY)
    assert (found.digest, found.metrics, found.details, found.mlflow_run_id, found.seconds) == (
        (made.digest, {"loss": 0.5}, {"rows": 3}, "run", 1.5)
    )
    copied = two.fetch(found)
    assert contents(copied) == FILES and Path(copied.path) == two.place("sft", KEY)
    assert two.find("sft", KEY) == copied
    assert two.identity("sft", KEY) == IDENTITY


def test_artifact_never_built_is_not_found_and_asking_makes_nothing(machines, shared):
    one, _ = machines
    assert one.find("sft", KEY) is None and one.identity("sft", KEY) is None
    assert not shared.exists()


def test_artifact_fetched_once_is_not_copied_again(machines, shared):
    one, two = machines
    build(one)
    found = two.find("sft", KEY)
    two.fetch(found)
    only(shared, "adapter.safetensors").unlink()
    assert contents(two.fetch(found)) == FILES


def test_artifact_damaged_on_this_machine_is_taken_from_the_store(machines, caplog):
    one, two = machines
    build(one)
    (two.fetch(two.find("sft", KEY)) / "adapter.safetensors").write_text("weightz")
    assert contents(two.fetch(two.find("sft", KEY))) == FILES
    assert "adapter.safetensors" in caplog.text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "file shorter": lambda shared: cut(only(shared, "adapter.safetensors")),
    "file longer": lambda shared: only(shared, "empty").write_text("x"),
    "file gone": lambda shared: only(shared, "a b #1.json").unlink(),
    "manifest cut": lambda shared: cut(only(shared, MANIFEST)),
    "manifest empty": lambda shared: only(shared, MANIFEST).write_text(""),
    "manifest of another form": lambda shared: only(shared, MANIFEST).write_text("[1]"),
    "manifest binary": lambda shared: only(shared, MANIFEST).write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_artifact_damaged_in_the_store_is_not_found_and_said_so_and_built_again(how, machines, shared, caplog):
    one, two = machines
    build(one)
    DAMAGE[how](shared)
    assert two.find("sft", KEY) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] and f"{two.remote.url}/sft/{KEY}" in caplog.text
    again = build(two, "better")
    lose(one)
    found = one.find("sft", KEY)
    assert found.digest == again.digest
    assert contents(one.fetch(found)) == FILES | {"adapter.safetensors": "better"}


def test_artifact_without_its_manifest_does_not_exist(machines, shared):
    one, two = machines
    build(one)
    only(shared, MANIFEST).unlink()
    assert two.find("sft", KEY) is None


def test_artifact_altered_at_equal_size_is_refused_at_fetch_and_forgotten_and_built_again(machines, shared):
    one, two = machines
    build(one)
    only(shared, "adapter.safetensors").write_text("weightz")
    found = two.find("sft", KEY)
    with pytest.raises(JobFailed, match=r"adapter\.safetensors"):
        two.fetch(found)
    assert two.find("sft", KEY) is None and not two.place("sft", KEY).exists()
    build(two)
    lose(one)
    assert contents(one.fetch(one.find("sft", KEY))) == FILES  # the same bytes went over the damaged ones


def test_artifact_rebuilt_with_other_bytes_is_not_taken_for_the_one_found_before(machines):
    one, two = machines
    build(one)
    found = two.find("sft", KEY)
    one.remote.forget("sft", KEY)
    lose(one)
    build(one, "better")
    with pytest.raises(MachineUnfit, match=found.digest):
        two.fetch(found)


def test_artifact_of_another_version_is_refused_by_name(machines, shared):
    one, two = machines
    build(one)
    manifest = only(shared, MANIFEST)
    manifest.write_text(manifest.read_text().replace('"metrics"', '"color": "red", "metrics"'))
    with pytest.raises(MachineUnfit, match="color"):
        two.find("sft", KEY)


def test_push_that_breaks_off_leaves_nothing_that_exists(machines, shared, tmp_path):
    made = build(Store(tmp_path / "one"))
    (made / "sub" / "empty").unlink()
    one, two = machines
    with pytest.raises(MachineUnfit):
        one.remote.push(Path(made.path), "sft", KEY)
    assert only(shared, "adapter.safetensors").is_file()
    assert two.find("sft", KEY) is None
    assert contents(two.fetch(build(two))) == FILES


def test_second_of_two_builds_on_two_machines_yields_to_the_first(machines):
    one, two = machines
    first = build(one, "sooner")
    second = build(two, "later")
    assert second.digest == first.digest
    assert contents(two.fetch(second)) == FILES | {"adapter.safetensors": "sooner"} == contents(first)


def test_two_builds_of_one_key_at_once_agree_on_one_whole_artifact(machines, tmp_path):
    """Sizes are equal and bytes are not, so a mix of two builds would pass by its sizes and fail by its hashes."""
    names, start = ("first--", "second-"), threading.Barrier(2)
    digests: dict[str, list[str]] = {name: [] for name in names}

    def build_many(store: Store, name: str) -> None:
        for number in range(20):
            start.wait()
            digests[name].append(build(store, name, f"{number:012}").digest)

    threads = [threading.Thread(target=build_many, args=pair) for pair in zip(machines, names, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = digests.values()
    assert one == two and len(one) == 20
    reader = Store(tmp_path / "reader", machines[0].remote)
    for number, digest in enumerate(one):
        copied = reader.fetch(reader.find("sft", f"{number:012}"))
        assert copied.digest == digest and contents(copied)["adapter.safetensors"] in names


# --- references: what one machine calls an input, and another makes of it -------------------------------------------------


def test_reference_of_an_artifact_is_resolved_on_another_machine(machines):
    one, two = machines
    made = build(one)
    path = Path(two.resolve(one.reference(made), made.digest))
    assert path == two.place("sft", KEY) and (path / "adapter.safetensors").read_text() == "weights"
    assert two.reference(two.find("sft", KEY)) == one.reference(made)


def test_reference_of_what_is_only_in_the_store_is_resolved_on_another_machine(machines, tmp_path):
    one, two = machines
    made = build(one)
    lose(one)
    reference = one.reference(one.find("sft", KEY))
    assert Path(two.resolve(reference, made.digest)) == two.place("sft", KEY)


def test_reference_of_an_artifact_older_than_the_store_brings_it_there(machines, tmp_path):
    made = build(Store(tmp_path / "one"))
    one, two = machines
    path = two.resolve(one.reference(one.find("sft", KEY)), made.digest)
    assert (Path(path) / "adapter.safetensors").read_text() == "weights"


def test_reference_of_an_artifact_of_which_the_store_has_another_build_is_refused(machines, tmp_path):
    made = build(Store(tmp_path / "one"), "alone")
    one, two = machines
    build(two, "shared")
    with pytest.raises(MachineUnfit, match=made.digest):
        one.reference(one.find("sft", KEY))


def test_reference_to_another_build_than_was_ordered_is_refused_with_the_way_out(machines):
    one, two = machines
    made = build(one)
    with pytest.raises(MachineUnfit) as refused:
        two.resolve(one.reference(made), "0" * 12)
    for part in (f"sft/{KEY}", "0" * 12, str(two.place("sft", KEY))):
        assert part in str(refused.value)


def test_reference_to_what_is_not_there_is_refused_by_the_store_s_address(machines):
    _, two = machines
    with pytest.raises(MachineUnfit, match=f"sft/{KEY}.*{two.remote.url}"):
        two.resolve(f"store:sft/{KEY}", "0" * 12)


def base_model(folder: Path) -> Artifact:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(name)
    return local_model("recipe.base_model", folder)


def test_reference_of_a_local_base_model_is_resolved_on_another_machine_by_its_bytes(machines, tmp_path):
    one, two = machines
    model = base_model(tmp_path / "model")
    reference = one.reference(model)
    path = Path(two.resolve(reference, model.digest))
    assert path.is_relative_to(two.root) and (path / "model.safetensors").read_text() == "model.safetensors"
    assert one.reference(model) == reference
    with pytest.raises(MachineUnfit):
        two.resolve(reference, "0" * 64)


@pytest.mark.parametrize("inside", ["", "model"])
def test_reference_of_a_base_model_in_the_store_is_resolved_on_another_machine_by_its_bytes(inside, machines, tmp_path):
    """recipe.base_model.path may name what another profile's merge left, or a folder of it."""
    alone = Store(tmp_path / "one")
    with alone.staging("merge", KEY) as staged:
        base_model(staged / "model")
        for path in (staged / "model").iterdir():
            (staged / path.name).write_bytes(path.read_bytes())
        merged = alone.commit(staged, Artifact("merge", str(staged), KEY, ""), IDENTITY)
    one, two = machines
    model = local_model("recipe.base_model", merged / inside)
    path = Path(two.resolve(one.reference(model), model.digest))
    assert path == two.place("merge", KEY) / inside and (path / "model.safetensors").read_text() == "model.safetensors"
    with pytest.raises(MachineUnfit):
        two.resolve(one.reference(model), "0" * 64)


def test_references_without_a_shared_store_are_paths_that_must_hold_the_same_bytes(tmp_path):
    store, model = Store(tmp_path / "one"), base_model(tmp_path / "model")
    made = build(store)
    assert Store(tmp_path / "one").resolve(store.reference(made), made.digest) == made.path
    assert store.resolve(store.reference(model), model.digest) == model.path
    (tmp_path / "model" / "config.json").write_text("other")
    with pytest.raises(MachineUnfit, match="POSTTRAIN_STORE"):
        store.resolve(store.reference(model), model.digest)


def test_reference_of_a_hub_model_is_its_repository_and_commit(machines, tmp_path):
    assert machines[0].reference(hub_model("org/m", "a" * 40, tmp_path)) == f"hub:org/m@{'a' * 40}"


# --- addresses ------------------------------------------------------------------------------------------------------------


def test_store_whose_address_ends_in_slashes_is_the_same_store(machines, shared, tmp_path):
    one, _ = machines
    made = build(one)
    slashed = Store(tmp_path / "three", RemoteStore(f"file://{shared}//"))
    assert slashed.find("sft", KEY).path == f"file://{shared}/sft/{KEY}"
    assert contents(slashed.fetch(slashed.find("sft", KEY))) == contents(made)
    assert slashed.id() == one.id()


def test_id_is_the_place_s_own_however_it_is_reached(machines, shared, tmp_path):
    one, two = machines
    assert one.id() == two.id()
    (tmp_path / "mounted elsewhere").symlink_to(shared)
    assert Store(tmp_path / "three", RemoteStore(f"file://{tmp_path}/mounted elsewhere")).id() == one.id()
    assert Store(tmp_path / "one", RemoteStore(f"file://{tmp_path}/another")).id() != one.id()


@pytest.mark.parametrize("remote", [True, False])
def test_id_asked_for_first_by_many_at_once_is_one(remote, shared, tmp_path):
    for number in range(20):
        address = f"file://{shared}/{number}"
        stores = [Store(tmp_path / f"{number}", RemoteStore(address) if remote else None) for _ in range(4)]
        with ThreadPoolExecutor(len(stores)) as pool:
            ids = list(pool.map(Store.id, stores))
        assert len(set(ids)) == 1 and len(ids[0]) == 32


UNUSABLE = ["/a/folder", "folder", "file:///", "file://folder", "file://", "s3://", "nosuchscheme://bucket/prefix", "://x"]


@pytest.mark.parametrize("url", UNUSABLE)
def test_address_that_names_no_place_is_refused_with_the_way_out(url):
    with pytest.raises(MachineUnfit) as refused:
        RemoteStore(url)
    for part in ("POSTTRAIN_STORE", repr(url), "file:///", "s3://", "unset"):
        assert part in str(refused.value)


def test_store_where_no_folder_can_be_made_is_refused_and_the_build_is_kept_here(tmp_path):
    (tmp_path / "file").write_text("in the way")
    url = f"file://{tmp_path}/file/store"
    with pytest.raises(MachineUnfit) as refused:
        build(Store(tmp_path / "one", RemoteStore(url)))
    kept = Store(tmp_path / "one").find("sft", KEY)
    assert contents(kept) == FILES
    assert "POSTTRAIN_STORE" in str(refused.value) and url in str(refused.value) and kept.path in str(refused.value)


def test_commit_to_a_store_that_is_full_is_refused_by_its_setting(small_disk, tmp_path):
    store = Store(tmp_path / "one", RemoteStore(f"file://{small_disk(64)}"))
    with pytest.raises(MachineUnfit, match=r"POSTTRAIN_STORE.*space"):
        build(store, "w" * 2**17)
    assert Store(tmp_path / "two", store.remote).find("sft", KEY) is None


def test_fetch_to_a_disk_that_is_full_is_refused_by_this_machine_s_setting_and_forgets_nothing(machines, small_disk):
    one, _ = machines
    build(one, "w" * 2**17)
    full = Store(small_disk(64) / "store", one.remote)
    with pytest.raises(MachineUnfit, match="POSTTRAIN_HOME"):
        full.fetch(full.find("sft", KEY))
    assert full.find("sft", KEY) is not None and not full.place("sft", KEY).exists()


def test_imports_of_the_store_bring_no_file_system_library():
    code = "import sys, tasks.artifacts; print(sorted({'fsspec', 's3fs', 'botocore'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# --- what a job says while it runs ----------------------------------------------------------------------------------------


def test_log_that_grew_is_read_from_where_it_ended_here(machines, tmp_path):
    there, here = tmp_path / "there" / "log.txt", tmp_path / "here" / "log.txt"
    there.parent.mkdir(), here.parent.mkdir()
    one, two = (machine.remote for machine in machines)
    two.get_work("p/r/sft", here)
    assert not here.exists()
    there.write_text("abc\n")
    here.write_text("ABC\n")  # other bytes tell what was read again
    for text in ("abc\n", "abc\ndef\n"):
        there.write_text(text)
        one.put_work("p/r/sft", there)
        two.get_work("p/r/sft", here)
    assert here.read_text() == "ABC\ndef\n"


def test_log_on_a_common_disk_is_ahead_of_its_copy_and_left_alone(machines, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("one\n")
    machines[0].remote.put_work("p/r/sft", log)
    log.write_text("one\ntwo\n")
    machines[1].remote.get_work("p/r/sft", log)
    assert log.read_text() == "one\ntwo\n"


def test_outcome_is_replaced_whole(machines, tmp_path):
    there, here = tmp_path / "there" / "outcome.json", tmp_path / "here" / "outcome.json"
    there.parent.mkdir(), here.parent.mkdir()
    for text in ('{"error": "JobFailed"}', '{"error": null}', '{"error": "MachineUnfit"}'):
        there.write_text(text)
        machines[0].remote.put_work("p/r/sft", there)
        machines[1].remote.get_work("p/r/sft", here)
        assert here.read_text() == text


def test_work_files_that_cannot_be_moved_cost_a_warning_and_nothing_else(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "log.txt"
    path.write_text("one\n")
    remote = RemoteStore(f"file://{tmp_path}/file/store")
    remote.put_work("p/r/sft", path)
    remote.get_work("p/r/sft", path)
    assert path.read_text() == "one\n"
    assert {record.levelname for record in caplog.records} == {"WARNING"} and remote.url in caplog.text
