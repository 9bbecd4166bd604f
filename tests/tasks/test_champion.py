"""Releases in a real registry: who may become the champion, what a rollback restores, and what a race leaves."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tasks import champion
from tasks.artifacts import Artifact, Store
from tasks.errors import ProfileError, ReleaseFailed
from tasks.monitoring import mlflow_runs, registry

RACE = """
import sys, time
from tasks import champion
from tasks.errors import ReleaseFailed
from tasks.monitoring import mlflow_runs, registry
number, name = int(sys.argv[1]), sys.argv[2]
found = mlflow_runs.client().get_model_version(name, str(number))
version = registry.Version(name, number, 0.0, "", dict(found.tags))
print("ready", flush=True)
sys.stdin.readline()
with champion.exclusive(name):
    entered = time.monotonic()
    try:
        champion.promote(version, {"version": None, "compared_with": None})
        end = "champion"
    except ReleaseFailed:
        end = "refused"
    time.sleep(0.2)
    left = time.monotonic()
print(end, entered, left)
"""
HOLD = """
import sys, time
from tasks import champion
with champion.exclusive(sys.argv[1]):
    print("has", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """One registry for all tests, each with a model of its own: to make a database takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def name(database: str, monkeypatch, request) -> str:
    """The name of the test's own model in a real registry."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    return f"model-{abs(hash(request.node.name))}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def export(store: Store, letter: str, also: str = "") -> Artifact:
    """An export in the store; its fingerprint is its letter."""
    with store.staging("export", letter) as staged:
        (staged / "model.safetensors").write_text(f"weights of {letter}")
        (staged / "parity.json").write_text(also)
        return store.commit(staged, Artifact("export", "", letter, ""), {})


def release(name: str, store: Store, letter: str, also: str = "") -> registry.Version:
    """A registered version of such an export, of a run of its own."""
    run_id = mlflow_runs.open_run(name, letter, {})
    tags = {"policy.stage": "grpo", "policy.fingerprint": f"policy-{letter}", "run_id": f"run-{letter}"}
    return registry.register(name, export(store, letter, also), run_id, tags)


def against(version: registry.Version | None) -> dict:
    return {
        "version": version.number if version else None,
        "compared_with": version.fingerprint if version else None,
    }


def in_force(name: str) -> dict[str, str]:
    return {alias: version.fingerprint for alias, version in champion.aliases(name).items()}


def test_export_is_registered_once_with_its_proof_and_is_the_candidate(name, store):
    first = release(name, store, "a")
    again = registry.register(name, export(store, "a"), mlflow_runs.open_run(name, "again", {}), {"run_id": "other"})
    assert (again.number, again.tags["run_id"]) == (first.number, "run-a")
    assert release(name, store, "b").number == first.number + 1
    assert in_force(name) == {"candidate": "b"}
    artifacts = mlflow_runs.client().list_artifacts(first.mlflow_run_id, registry.PROOF)
    assert [file.path for file in artifacts] == ["export/manifest.json", "export/parity.json"]


def test_first_release_has_no_previous_and_the_second_keeps_the_first(name, store):
    a, b = release(name, store, "a"), release(name, store, "b")
    assert champion.promote(a, against(None))
    assert in_force(name) == {"champion": "a", "candidate": "b"}
    assert not champion.promote(a, against(None))  # it is the champion already
    assert champion.promote(b, against(a))
    assert in_force(name) == {"champion": "b", "previous": "a", "candidate": "b"}


@pytest.mark.parametrize("compared_with_the_old", [True, False])
def test_release_compared_with_another_champion_is_refused(name, store, compared_with_the_old):
    a, b, c = (release(name, store, letter) for letter in "abc")
    champion.promote(a, against(None))
    champion.promote(b, against(a))
    with pytest.raises(ReleaseFailed, match="is the champion now"):
        champion.promote(c, against(a if compared_with_the_old else None))
    assert in_force(name)["champion"] == "b"
    assert champion.promote(c, against(b))


def test_rollback_restores_the_previous_release_which_is_not_overtaken_by_the_one_taken_back(name, store):
    a, b = release(name, store, "a"), release(name, store, "b")
    champion.promote(a, against(None))
    champion.promote(b, against(a))
    now, former = champion.rollback(name, store, "it swears")
    assert (now.fingerprint, former.fingerprint) == ("a", "b")
    assert in_force(name)["champion"] == "a"
    b = registry.at(name, "previous")
    with pytest.raises(ReleaseFailed, match="it swears"):
        champion.promote(b, against(a))
    with pytest.raises(ReleaseFailed, match="taken back itself"):
        champion.rollback(name, store, "again")
    assert in_force(name)["champion"] == "a"
    assert champion.promote(b, against(None), "the swearing was in the prompt")
    assert "the swearing was in the prompt" in registry.at(name, "champion").tags["forced"]


def test_rollback_without_a_previous_release_or_with_a_damaged_one_moves_nothing(name, store):
    with pytest.raises(ReleaseFailed, match="no previous"):
        champion.rollback(name, store, "why")
    a, b = release(name, store, "a"), release(name, store, "b")
    champion.promote(a, against(None))
    with pytest.raises(ReleaseFailed, match="no previous"):
        champion.rollback(name, store, "why")
    champion.promote(b, against(a))
    (store.place("export", "a") / "model.safetensors").write_text("other weights")
    with pytest.raises(ReleaseFailed, match="damaged"):
        champion.rollback(name, store, "why")
    assert in_force(name) == {"champion": "b", "previous": "a", "candidate": "b"}


class Died(Exception):
    """What stands for a death between two writes to the registry."""


@pytest.fixture
def dies(monkeypatch):
    """A function that lets all writes of an alias after the first so many fail, and with None lets them all pass again."""
    point = registry.point

    def arrange(after: int | None) -> None:
        left = [after]

        def limited(version, alias):
            if after is not None and left[0] == 0:
                raise Died
            left[0] = left[0] - 1 if after is not None else None
            point(version, alias)

        monkeypatch.setattr(registry, "point", limited)

    return arrange


def three(name, store) -> list[registry.Version]:
    """a was released, then b; c is a candidate that was compared with b."""
    a, b, c = (release(name, store, letter) for letter in "abc")
    champion.promote(a, against(None))
    champion.promote(b, against(a))
    return [a, b, c]


def test_death_between_the_two_writes_of_a_promotion_leaves_the_old_champion_and_the_way_back(name, store, dies):
    _, b, c = three(name, store)
    dies(1)
    with pytest.raises(Died):
        champion.promote(c, against(b))
    dies(None)
    assert in_force(name)["champion"] == "b"
    now, former = champion.rollback(name, store, "b was wrong, too")  # a, though `previous` points to b by now
    assert (now.fingerprint, former.fingerprint) == ("a", "b")
    assert in_force(name) == {"champion": "a", "previous": "b", "candidate": "c"}


def test_promotion_after_such_a_death_keeps_the_right_previous_release(name, store, dies):
    _, b, c = three(name, store)
    dies(1)
    with pytest.raises(Died):
        champion.promote(c, against(b))
    dies(None)
    assert champion.promote(c, against(b))
    assert in_force(name) == {"champion": "c", "previous": "b", "candidate": "c"}


def test_death_between_the_two_writes_of_a_rollback_leaves_the_good_release_in_force(name, store, dies):
    three(name, store)
    dies(1)
    with pytest.raises(Died):
        champion.rollback(name, store, "it swears")
    dies(None)
    assert in_force(name)["champion"] == "a"
    assert registry.at(name, "champion").tags.get("rolled_back") is None


def test_export_built_again_takes_the_champions_place_and_the_way_back_stays(name, store):
    """As after its folder was damaged: the same fingerprint, other bytes in parity.json."""
    a, b, _ = three(name, store)
    shutil.rmtree(store.place("export", "b"))
    rebuilt = release(name, store, "b", also="parity.json")
    assert rebuilt.number != b.number
    assert not champion.promote(rebuilt, against(b))
    assert registry.at(name, "champion").number == rebuilt.number
    assert in_force(name) == {"champion": "b", "previous": "a", "candidate": "b"}
    assert champion.rollback(name, store, "why")[0].number == a.number


def test_export_with_other_bytes_than_were_released_is_neither_compared_with_nor_rolled_back_to(name, store):
    _, b, _ = three(name, store)
    shutil.rmtree(store.place("export", "a"))
    export(store, "a", also="something else")
    with pytest.raises(ReleaseFailed, match="another build.*nothing was moved"):
        champion.rollback(name, store, "why")
    assert in_force(name)["champion"] == "b"
    shutil.rmtree(store.place("export", "b"))
    export(store, "b", also="something else")
    with pytest.raises(ReleaseFailed, match=f"another build.*posttrain rollback {name} --reason"):
        champion.find_opponent(name, store, policy("policy-x"))
    assert champion.export_of(registry.at(name, "candidate"), store).fingerprint == "c"


def test_release_that_was_forced_after_a_rollback_can_be_rolled_back_to(name, store):
    a, b, c = three(name, store)
    champion.rollback(name, store, "it swears")
    b = registry.at(name, "previous")
    champion.promote(b, against(a), "it does not")
    champion.promote(c, against(b))
    now, _ = champion.rollback(name, store, "it swears worse")
    assert now.fingerprint == "b" and "rolled_back" not in registry.at(name, "champion").tags


def test_version_that_no_run_registered_is_named(name, store):
    release(name, store, "a")
    client = mlflow_runs.client()
    made = client.create_model_version(name, "file:///somewhere")
    client.set_registered_model_alias(name, "champion", made.version)
    with pytest.raises(ReleaseFailed, match=f"version {made.version} of .* by hand"):
        registry.at(name, "champion")


@pytest.mark.parametrize("odd", ["it's", "profiles/quickstart.yaml", "", "../x"])
def test_what_is_no_profiles_name_is_refused(odd, name):
    with pytest.raises(ProfileError, match="no profile's name"):
        registry.at(odd, "champion")


def test_registry_that_others_reach_is_not_moved_without_a_server_that_keeps_them_apart(name, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    with pytest.raises(ReleaseFailed, match="PREFECT_API_URL"), champion.exclusive(name):
        pytest.fail("entered")


def test_right_that_another_process_holds_too_long_is_given_up_with_its_number(name, monkeypatch):
    monkeypatch.setattr(champion, "LOCK_SECONDS", 1)
    process = subprocess.Popen([sys.executable, "-P", "-c", HOLD, name], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has\n"
    with pytest.raises(ReleaseFailed, match=f"process {process.pid}"), champion.exclusive(name):
        pytest.fail("entered")
    process.kill()
    process.wait()


def policy(letter: str) -> Artifact:
    return Artifact("grpo", "/policy", letter, letter)


def test_policy_is_compared_with_the_champion_and_the_champions_own_with_what_it_was_compared_with(name, store):
    assert champion.find_opponent(name, store, policy("policy-a")) == champion.Opponent(None, None)
    a, b = release(name, store, "a"), release(name, store, "b")
    champion.promote(a, against(None))
    found = champion.find_opponent(name, store, policy("policy-b"))
    assert (found.version, found.export.fingerprint) == (a.number, "a")
    assert champion.find_opponent(name, store, policy("policy-a")) == champion.Opponent(a.number, None)
    champion.promote(b, against(a))
    found = champion.find_opponent(name, store, policy("policy-b"))
    assert (found.version, found.export.fingerprint) == (b.number, "a")


def test_champion_whose_export_is_lost_stops_the_comparison(name, store):
    champion.promote(release(name, store, "a"), against(None))
    (store.place("export", "a") / "model.safetensors").unlink()
    with pytest.raises(ReleaseFailed, match=f"posttrain rollback {name}"):
        champion.find_opponent(name, store, policy("policy-b"))


def test_of_releases_that_race_exactly_one_becomes_the_champion(name, store):
    numbers = [release(name, store, letter).number for letter in "abc"]
    command = [sys.executable, "-P", "-c", RACE]
    processes = [
        subprocess.Popen([*command, str(n), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n in numbers
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = sorted((process.communicate(timeout=120)[0].split() for process in processes), key=lambda end: float(end[1]))
    assert [end[0] for end in ends] == ["champion", "refused", "refused"]
    assert all(float(one[2]) <= float(next_one[1]) for one, next_one in pairwise(ends))  # one after the other
