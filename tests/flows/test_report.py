"""The report shows every stage, every number and every text as it is."""

from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flows import report
from profiles.load import load
from tasks.gates import Claim
from tasks.paired import estimate
from tasks.pipeline_run import PipelineRun, StageRecord

EVIL = "<script>alert('x')</script> & \"more\""


class Cells(HTMLParser):
    """Collects the tags of a page, and the text of each table row's cells as a browser would show it."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        elif tag != "tr":
            self.inside = False

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data


def record(stage: str, status: str = "ran", **facts: Any) -> dict[str, Any]:
    return asdict(StageRecord(stage, status, **facts))


def claim(verdict: str, text: str, asked: str = "better than base | no champion yet") -> dict[str, Any]:
    return asdict(Claim(asked, verdict, text, "accuracy", 40, 0.0512, -0.01, 0.11, 0.02, 0.4))


def gate(verdict: str, *claims: dict[str, Any]) -> dict[str, Any]:
    return {"verdict": verdict, "claims": list(claims), "looks": 3}


@pytest.fixture
def run(tmp_path: Path) -> PipelineRun:
    profile = load("quickstart", [f"description={EVIL!r}"]).model_copy(update={"description": EVIL})
    return PipelineRun(profile, "20261122-120000-abcd", tmp_path, "mlflow-run", "flow-run")


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        "profile": "quickstart",
        "status": "failed",
        "exit_code": 6,
        "error": f"GateFailed: {EVIL}",
        "stages": [
            record("prepare", "cached", fingerprint="aaaaaaaaaaaa"),
            record("validate-eval", seconds=1.2),
            record("sft", seconds=12.6, fingerprint="bbbbbbbbbbbb", metrics={"mean_token_accuracy": 0.98765}),
            record("reward_model", "failed", reason=f"JobFailed: {EVIL}\nLog: /somewhere"),
            record("grpo", "skipped", reason="an earlier stage stopped the run"),
        ],
        "metrics": {"accuracy": {"base": asdict(estimate([0, 0, 0, 1])), "policy": asdict(estimate([1, 1, 1, 0]))}},
        "gate": gate("INCONCLUSIVE", claim("INCONCLUSIVE", f"accuracy {EVIL}"), claim("PASS", "p=0.4", asked="floor")),
        "retrain": None,
        "cost": {
            "total": {"wall_seconds": 100.0, "cpu_seconds": 7200.0, "gpu_seconds": 0.0},
            "waste": {"died": {"wall_seconds": 5.0, "cpu_seconds": 9.0, "gpu_seconds": 0.0}},
        },
        "approval": {"decision": "refuse", "reviewer": EVIL, "reason": "no", "at": "2026-11-22 18:00 UTC", "run_id": "r"},
        "export": None,
        "serve": None,
    }


def test_html_shows_every_stage_with_its_status_seconds_metric_and_fingerprint(run, summary):
    rows = Cells(report.html(run, summary, {}, {})).rows
    assert ["prepare", "cached", "", "", "aaaaaaaaaaaa"] in rows
    assert ["validate-eval", "ran", "1", "", ""] in rows
    assert ["sft", "ran", "13", "mean_token_accuracy 0.988", "bbbbbbbbbbbb"] in rows
    assert [row[:2] for row in rows if row[0] in ("reward_model", "grpo")] == [["reward_model", "failed"], ["grpo", "skipped"]]


def test_html_shows_every_text_as_it_is_and_none_as_markup(run, summary):
    page = Cells(report.html(run, summary, {}, {}))
    assert "script" not in page.tags
    assert page.text.count("alert('x')") == 5  # description, error, stage's reason, gate's reason, reviewer


def test_html_shows_each_models_share_with_its_interval(run, summary):
    """1 of 4 and 3 of 4; the intervals are Wilson's, derived in tests/tasks/test_gates.py."""
    rows = Cells(report.html(run, summary, {}, {})).rows
    for name, scores in (("base", [0, 0, 0, 1]), ("policy", [1, 1, 1, 0])):
        e = estimate(scores)
        assert ["accuracy", name, f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]", "4"] in rows


def test_html_shows_the_verdict_and_each_claim_with_its_numbers(run, summary):
    page = Cells(report.html(run, summary, {}, {}))
    assert "Gate: INCONCLUSIVE" in page.text and "p=0.4" in page.text and "number 3" in page.text
    assert [
        "INCONCLUSIVE",
        "better than base | no champion yet",
        "accuracy",
        "40",
        "+0.051",
        "[-0.010, +0.110]",
        "+0.020",
    ] in page.rows
    assert ["PASS", "floor", "accuracy", "40", "0.051", "[-0.010, 0.110]", "0.020"] in page.rows


def test_html_of_a_gate_that_asked_nothing_says_so(run, summary):
    text = Cells(report.html(run, summary | {"gate": gate("PASS")}, {}, {})).text
    assert "PASS" in text and "Nothing was asked" in text


def test_claim_without_numbers_has_none_in_its_row():
    drifted = asdict(Claim("no drift between retrains", "FAIL", "a drop", "canary/reward", estimate=0.8, limit=0.15))
    assert report.claim_cells(drifted) == ["FAIL", "no drift between retrains", "canary/reward", "", "+0.800", "", "+0.150"]
    apart = asdict(Claim("comparable with champion", "INCONCLUSIVE", "other templates", "accuracy"))
    assert report.claim_cells(apart)[3:] == ["", "", "", ""]


def test_html_of_a_run_that_came_to_nothing_still_is_a_page(run, summary):
    page = Cells(report.html(run, summary | {"stages": [], "metrics": {}, "gate": None, "approval": None}, {}, {}))
    assert "quickstart" in page.text


def test_html_shows_what_each_model_answers(run, summary, tmp_path):
    lines = [
        f'{{"metric": "{metric}", "model": "{model}", "row": 0, "prompt": "sort <b>31</b>", "answer": "13", '
        f'"completion": "{said}", "score": 0}}'
        for metric, model, said in (("accuracy", "base", "<i>31"), ("accuracy", "policy", "13"), ("reward/x", "sft", "other"))
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    evaluated = record("evaluate", artifact=str(tmp_path), metrics={"accuracy/policy": 1.0})
    page = Cells(report.html(run, summary | {"stages": [evaluated]}, {}, {}))
    assert ["sort <b>31</b>", "13", "<i>31", "13"] in page.rows
    assert "b" not in page.tags and "i" not in page.tags


def test_html_reaches_for_nothing_outside_itself(run, summary):
    page = report.html(run, summary, {}, {})
    assert "http://" not in page and "https://" not in page and "src='/" not in page


def test_markdown_has_a_row_for_every_stage_and_the_gates_reasons(run, summary):
    text = report.markdown(run, summary, {})
    for stage in summary["stages"]:
        [row] = [line for line in text.splitlines() if line.startswith(f"| {stage['stage']} |")]
        assert stage["status"] in row
    assert "quickstart" in text and "**gate** INCONCLUSIVE" in text
    rows = [line.replace("\\|", "") for line in text.splitlines() if "| accuracy |" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| INCONCLUSIVE", "| PASS"]
    assert {row.count("|") for row in rows} == {len(report.CLAIM_HEAD) + 1}


def test_markdown_row_of_a_reason_with_a_bar_has_as_many_columns_as_the_head(run, summary):
    failed = record("sft", "failed", reason="JobFailed: learning_rate wants int | None")
    lines = report.markdown(run, summary | {"stages": [failed], "error": None}, {}).splitlines()
    head, row = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("stage", "sft"))
    assert row.replace("\\|", "").count("|") == head.count("|")


def test_markdown_quotes_every_line_of_an_error(run, summary):
    error = "ContractBroken: two problems:\nthe first\nthe second"
    lines = report.markdown(run, summary | {"error": error}, {}).splitlines()
    assert [line for line in lines if "the second" in line][0].startswith(">")


def test_stage_cells_keep_to_one_short_line_each(run):
    cells = report.stage_cells(record("sft", "failed", reason="first line\nsecond line " + "x" * 500))
    assert cells[3] == "first line"
    assert all("\n" not in cell and len(cell) <= 80 for cell in cells)


def test_row_of_a_dataset_says_how_many_of_its_rows_do_not_train(run, summary):
    aside = record("validate-sft", "cached", metrics={"num_rows": 97.0, "data/quarantined_rows": 3.0})
    page = Cells(report.html(run, summary | {"stages": [aside]}, {}, {}))
    assert ["validate-sft", "cached", "", "3 bad rows set aside", ""] in page.rows


def test_html_says_what_was_released_apart_from_what_went_wrong_on_the_way(run, summary):
    stages = [record("grpo", notes=["kl averaged 0.4"]), record("promote", notes=["version 1 is the champion"])]
    text = Cells(report.html(run, summary | {"stages": stages, "approval": None}, {}, {})).text
    assert text.index("On the way") < text.index("grpo: kl averaged 0.4") < text.index("Release")
    assert text.index("Release") < text.index("version 1 is the champion")
    assert "On the way" not in Cells(report.html(run, summary | {"stages": stages[1:]}, {}, {})).text
