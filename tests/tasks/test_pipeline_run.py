"""Runs and their records are in the order in which they happened, whatever the clock says."""

from datetime import UTC, datetime

import pytest

from profiles.load import load
from tasks import pipeline_run
from tasks.pipeline_run import PipelineRun, StageRecord, open_pipeline_run


class Clock(datetime):
    """A clock that can be set."""

    shows: datetime

    @classmethod
    def now(cls, tz=None) -> datetime:
        return cls.shows


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """A function that opens a run when the clock shows an hour of one day."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(pipeline_run, "datetime", Clock)

    def open_at(hour: int) -> PipelineRun:
        Clock.shows = datetime(2026, 3, 29, hour, tzinfo=UTC)
        return open_pipeline_run(load("quickstart"), "")

    return open_at


def test_run_is_the_newest_also_where_the_clock_was_set_back(opened, caplog):
    names = [opened(hour).run_id for hour in (5, 5, 3, 4, 7)]
    assert names == sorted(names) and len({name[:15] for name in names}) == 5
    assert [name[9:15] for name in names] == ["050000", "050001", "050002", "050003", "070000"]
    assert caplog.text.count("the clock says") == 2


def test_record_of_the_last_attempt_counts_also_where_the_clock_was_set_back(opened, monkeypatch):
    run = opened(5)
    for shift, status in ((0, "failed"), (-3600, "failed"), (-7200, "ran")):
        monkeypatch.setattr("time.time_ns", lambda shift=shift: int((5 * 3600 + shift) * 1e9))
        monkeypatch.setattr("time.time", lambda shift=shift: 5.0 * 3600 + shift)
        run.record(StageRecord("sft", status))
    assert [record.status for record in run.records()] == ["failed", "failed", "ran"]
