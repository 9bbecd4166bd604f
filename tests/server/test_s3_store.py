"""The store on a real S3 server: SeaweedFS, one process, on ports of 127.0.0.1. Machines are folders, or other processes."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from real_s3 import CREDENTIALS
from real_server import free_port

from tasks.artifacts import MANIFEST, Artifact, Store
from tasks.errors import JobFailed, MachineUnfit
from tasks.remote_store import RemoteStore

PROJECT = Path(__file__).resolve().parents[2]
BUCKET = "artifacts"
KEY = "0123456789ab"
FILES = {"adapter.safetensors": "weights", "sub/deep/a b #1.json": "{}", "sub/empty": ""}
pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]


@pytest.fixture
def aws(s3, monkeypatch):
    """This process and its children as clients of the server, with the environment variables that any AWS client reads."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (s3 | {"AWS_MAX_ATTEMPTS": "1"}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(aws):
    """A client of the test's own to look into the bucket and to do damage there."""
    import s3fs

    client = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    if not client.exists(BUCKET):
        client.mkdir(BUCKET)
    return client


@pytest.fixture
def url(bucket) -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/store"


@pytest.fixture
def machines(url, tmp_path) -> tuple[Store, Store]:
    """Two machines with nothing in common but the bucket."""
    return Store(tmp_path / "one", RemoteStore(url)), Store(tmp_path / "two", RemoteStore(url))


def build(store: Store, weights: str = "weights", key: str = KEY) -> Artifact:
    with store.staging("sft", key) as staged:
        for name, text in (FILES | {"adapter.safetensors": weights}).items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_text(text)
        return store.commit(staged, Artifact("sft", str(staged), key, "", {"loss": 0.5}), {"stage": "sft"})


def contents(artifact: Artifact) -> dict[str, str]:
    folder = Path(artifact.path)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    return {name: (folder / name).read_text() for name in names}


def elsewhere(code: str, url: str, root: Path, *arguments: str) -> subprocess.Popen:
    """Run `code` in another process, with `store` on another machine's root and `build` as here."""
    start = (
        "import sys; from pathlib import Path\n"
        f"sys.path[:0] = [{str(PROJECT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_s3_store import build, contents, RemoteStore, Store\n"
        f"store, arguments = Store(Path({str(root)!r}), RemoteStore({url!r})), sys.argv[1:]\n"
    )
    return subprocess.Popen([sys.executable, "-c", start + code, *arguments], stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen) -> list[str]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out.split()


def keys(bucket, url: str) -> set[str]:
    """Return what is under an address, without the folder that is named after the digest."""
    root = url.removeprefix("s3://")
    return {path.removeprefix(f"{root}/") for path in bucket.find(root)}


def test_artifact_built_in_another_process_is_found_and_fetched_whole(url, machines, tmp_path):
    here, _ = machines
    assert here.find("sft", KEY) is None  # a cached listing would still say so below
    (digest,) = said(elsewhere("print(build(store).digest)", url, tmp_path / "far"))
    found = here.find("sft", KEY)
    assert (found.digest, found.metrics) == (digest, {"loss": 0.5})
    assert contents(here.fetch(found)) == FILES
    assert here.identity("sft", KEY) == {"stage": "sft"}


def test_artifact_forgotten_by_another_process_is_not_found_any_more(url, machines, tmp_path):
    one, two = machines
    build(one)
    assert two.find("sft", KEY) is not None
    said(elsewhere('store.remote.forget("sft", "0123456789ab")', url, tmp_path / "far"))
    assert two.find("sft", KEY) is None


def test_artifact_with_a_file_of_many_parts_arrives_as_it_was(machines):
    """s3fs sends a file in parts from 100 MiB on, and reads one in ranges from 50 MiB on."""
    one, two = machines
    with one.staging("export", KEY) as staged:
        with (staged / "model.safetensors").open("wb") as file:
            for number in range(101):
                file.write(bytes([number]) * 2**20)
        made = one.commit(staged, Artifact("export", str(staged), KEY, ""), {})
    copied = two.fetch(two.find("export", KEY))
    assert copied.digest == made.digest  # of the SHA-256 of what arrived: fetch compares it
    assert (copied / "model.safetensors").stat().st_size == 101 * 2**20


def test_push_that_breaks_off_leaves_nothing_that_exists(bucket, url, machines, tmp_path):
    alone, (one, two) = Store(tmp_path / "one"), machines
    made = build(alone)
    (made / "sub" / "empty").unlink()
    with pytest.raises(MachineUnfit):
        one.remote.push(Path(made.path), "sft", KEY)
    assert any(name.endswith("adapter.safetensors") for name in keys(bucket, url))
    assert two.find("sft", KEY) is None
    assert contents(two.fetch(build(two))) == FILES


def file_in(bucket, url: str, name: str) -> str:
    (path,) = [path for path in bucket.find(url.removeprefix("s3://")) if path.endswith(f"/{name}")]
    return path


DAMAGE = {
    "file shorter": lambda bucket, url: bucket.pipe_file(file_in(bucket, url, "adapter.safetensors"), b"weight"),
    "file emptied": lambda bucket, url: bucket.pipe_file(file_in(bucket, url, "adapter.safetensors"), b""),
    "file gone": lambda bucket, url: bucket.rm_file(file_in(bucket, url, "sub/empty")),
    "manifest cut": lambda bucket, url: bucket.pipe_file(file_in(bucket, url, MANIFEST), b'{"artifact": {'),
    "manifest empty": lambda bucket, url: bucket.pipe_file(file_in(bucket, url, MANIFEST), b""),
    "manifest of another form": lambda bucket, url: bucket.pipe_file(file_in(bucket, url, MANIFEST), b"[1]"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_artifact_damaged_in_the_bucket_is_not_found_and_said_so_and_built_again(how, bucket, url, machines, caplog):
    one, two = machines
    build(one)
    DAMAGE[how](bucket, url)
    assert two.find("sft", KEY) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] and f"{url}/sft/{KEY}" in caplog.text
    again = build(two, "better")
    one.root.rename(one.root.with_name("gone"))
    assert one.find("sft", KEY).digest == again.digest
    assert contents(one.fetch(one.find("sft", KEY))) == FILES | {"adapter.safetensors": "better"}


def test_artifact_altered_in_the_bucket_at_equal_size_is_refused_at_fetch_and_forgotten(bucket, url, machines):
    one, two = machines
    build(one)
    bucket.pipe_file(file_in(bucket, url, "adapter.safetensors"), b"weightz")
    found = two.find("sft", KEY)
    with pytest.raises(JobFailed, match=r"adapter\.safetensors"):
        two.fetch(found)
    assert two.find("sft", KEY) is None
    assert not two.place("sft", KEY).exists()
    assert contents(two.fetch(build(two))) == FILES
    one.root.rename(one.root.with_name("gone"))
    assert contents(one.fetch(one.find("sft", KEY))) == FILES  # the same bytes went over the damaged ones


BUILD_MANY = """
weights, mine, other = arguments
for number in range(12):
    Path(f"{mine}{number}").touch()
    while not Path(f"{other}{number}").exists(): pass
    print(build(store, weights, f"{number:012}").digest)
"""


def test_two_processes_that_build_one_key_at_once_agree_on_one_whole_artifact(url, machines, tmp_path):
    """Sizes are equal and bytes are not, so a mix of two builds would pass by its sizes and fail by its hashes."""
    reader, names = machines[0], ("first--", "second-")
    flags = [str(tmp_path / f"{name}at") for name in names]
    builders = [
        elsewhere(BUILD_MANY, url, tmp_path / name, name, *order)
        for name, order in zip(names, (flags, reversed(flags)), strict=True)
    ]
    one, two = (said(builder) for builder in builders)
    assert one == two and len(one) == 12
    for number, digest in enumerate(one):
        copied = reader.fetch(reader.find("sft", f"{number:012}"))
        assert copied.digest == digest
        assert contents(copied)["adapter.safetensors"] in names


def test_input_built_before_the_store_was_set_is_resolved_on_another_machine(machines, tmp_path):
    made = build(Store(tmp_path / "one"))
    one, two = machines
    reference = one.reference(one.find("sft", KEY))
    assert not Path(two.resolve(reference, made.digest)).is_relative_to(one.root)
    assert (Path(two.resolve(reference, made.digest)) / "adapter.safetensors").read_text() == "weights"


def test_id_is_the_bucket_s_own_and_not_the_prefix_beside_it(url, machines, tmp_path):
    one, two = machines
    assert [one.id()] == [two.id()] == said(elsewhere("print(store.id())", url + "/", tmp_path / "far"))
    assert Store(tmp_path / "one", RemoteStore(f"{url}2")).id() != one.id()


def test_work_files_grow_and_outcomes_are_replaced(machines, tmp_path, caplog):
    (one, two), there, here = machines, tmp_path / "there", tmp_path / "here"
    there.mkdir(), here.mkdir()
    two.remote.get_work("p/r/sft", here / "log.txt")
    assert list(here.iterdir()) == []
    for log, outcome in (("", '{"error": "JobFailed"}'), ("one\n", '{"error": null}'), ("one\ntwo\n", '{"error": 1}')):
        (there / "log.txt").write_text(log)
        (there / "outcome.json").write_text(outcome)
        for name in ("log.txt", "outcome.json"):
            one.remote.put_work("p/r/sft", there / name)
            two.remote.get_work("p/r/sft", here / name)
        assert ((here / "log.txt").read_text() if log else "", (here / "outcome.json").read_text()) == (log, outcome)
    (here / "log.txt").write_text("one\ntwo\nthree\n")  # as on a common disk, where the job is ahead of the copy
    two.remote.get_work("p/r/sft", here / "log.txt")
    assert (here / "log.txt").read_text() == "one\ntwo\nthree\n" and caplog.records == []


# --- what cannot be used --------------------------------------------------------------------------------------------------


def assert_unusable(url: str, tmp_path: Path) -> None:
    for use in (lambda store: store.find("sft", KEY), lambda store: store.id(), build):
        with pytest.raises(MachineUnfit) as refused:
            use(Store(tmp_path / uuid.uuid4().hex, RemoteStore(url)))
        assert "POSTTRAIN_STORE" in str(refused.value) and url in str(refused.value) and "s3://" in str(refused.value)


def test_bucket_that_does_not_exist_is_refused_and_not_made(bucket, tmp_path):
    assert_unusable("s3://no-such-bucket/prefix", tmp_path)
    assert not bucket.exists("no-such-bucket")


def test_server_that_does_not_answer_is_refused_and_the_build_is_kept_here(url, aws, tmp_path):
    aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert_unusable(url, tmp_path)
    with pytest.raises(MachineUnfit) as refused:
        build(Store(tmp_path / "one", RemoteStore(url)))
    kept = Store(tmp_path / "one").find("sft", KEY)
    assert contents(kept) == FILES and kept.path in str(refused.value)


@pytest.mark.parametrize("name", CREDENTIALS)
def test_credentials_that_are_wrong_are_refused(name, url, aws, tmp_path):
    aws.setenv(name, "wrong")
    assert_unusable(url, tmp_path)


def test_credentials_that_are_missing_are_refused(url, aws, tmp_path):
    for name in CREDENTIALS:
        aws.delenv(name)
    assert_unusable(url, tmp_path)


def test_work_files_without_a_server_cost_a_warning_and_nothing_else(url, aws, tmp_path, caplog):
    remote, path = RemoteStore(url), tmp_path / "log.txt"
    path.write_text("one\n")
    aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    remote.put_work("p/r/sft", path)
    remote.get_work("p/r/sft", path)
    assert path.read_text() == "one\n"
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"] and caplog.text.count(url) >= 2
