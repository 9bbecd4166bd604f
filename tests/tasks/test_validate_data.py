"""What a dataset is compared with: the rows that its profile last accepted from the same place, read in the same way."""

import json

from profiles.schema import Dataset
from tasks.artifacts import Artifact
from tasks.environment import home
from tasks.pipeline_run import store
from tasks.validate_data import last_snapshot, origin_of

ROWS = Dataset(path="rows.jsonl", kind="prompt_completion")


def accept(profile: str, run: str, dataset: Dataset, num_rows: int) -> None:
    """Leave what a run leaves that accepted these rows."""
    key = f"{profile}-{run}"
    details = {"origin": origin_of(dataset), "snapshot": {"num_rows": num_rows}}
    with store().staging("dataset", key) as staged:
        (staged / "rows.parquet").write_text(key)
        store().commit(staged, Artifact("dataset", str(staged), key, "", {}, details), {"stage": "dataset"})
    stages = home() / profile / run / "stages"
    stages.mkdir(parents=True)
    (stages / "1-validate-sft.json").write_text(json.dumps({"stage": "validate-sft", "fingerprint": key}))


def last(profile: str, dataset: Dataset = ROWS) -> int | None:
    found = last_snapshot(profile, "validate-sft", dataset)
    return found["num_rows"] if found else None


def test_first_rows_of_a_profile_are_compared_with_nothing():
    accept("another-profile", "20260101", ROWS, 1)
    assert last("first") is None


def test_rows_are_compared_with_the_newest_accepted_ones():
    for run, num_rows in (("20260102", 2), ("20260103", 3), ("20260101", 1)):
        accept("newest", run, ROWS, num_rows)
    assert last("newest") == 3


def test_rows_from_another_place_or_slice_are_another_set_and_limits_are_not():
    accept("places", "20260101", ROWS, 1)
    assert last("places", ROWS.model_copy(update={"contract": {"psi_max": 9}})) == 1
    assert last("places", ROWS.model_copy(update={"stop": 5})) is None
    assert last("places", ROWS.model_copy(update={"path": "others.jsonl"})) is None
    accept("places", "20260102", ROWS.model_copy(update={"stop": 5}), 5)
    assert last("places") == 1


def test_rows_of_the_hub_are_the_same_set_at_every_revision():
    first = Dataset(hub="owner/rows", revision="a" * 40, kind="preference")
    accept("hub", "20260101", first, 1)
    assert last("hub", first.model_copy(update={"revision": "b" * 40})) == 1
