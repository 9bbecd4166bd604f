"""A training row that repeats what is held out is told with the held-out row that it repeats."""

import json
from pathlib import Path

import pytest

from data_contracts.contract import contract_for
from data_contracts.held_out import HeldOut
from data_contracts.quarantine import Judged, judge_source
from data_contracts.rows import read_rows

BIRD = "Which bird sings at dawn?"
FERRY = "A ferry with ninety seats crosses the strait eleven times on each day of the regatta; how many can sail?"
LONG = " ".join(f"word{n}" for n in range(40))  # more than is shown
EXAM = [BIRD, "How deep is the lake?", FERRY, BIRD, LONG]


@pytest.fixture
def judged(write_rows, clean_rows, tmp_path: Path):
    exam = HeldOut.of(read_rows(write_rows([{"prompt": it, "answer": "x"} for it in EXAM], "exam.jsonl"), "eval"), "eval")

    def judge(kind: str, form: str, changes: dict[int, dict], **limits: float) -> tuple[Judged, list[list[str]]]:
        rows = clean_rows(kind, form, 40)
        for number, change in changes.items():
            rows[number] |= change
        file = tmp_path / "quarantine.jsonl"
        contract = contract_for(kind).with_limits(limits)
        result = judge_source(write_rows(rows), contract, exam, {}, file, tmp_path / "rows.parquet")
        return result, [json.loads(line)["reasons"] for line in file.read_text().splitlines()] if file.is_file() else []

    return judge


def example_of(judged: Judged, rule: str) -> str:
    [result] = [result for result in judged.verdict.results if result.rule == rule]
    return result.example


@pytest.mark.parametrize(
    ("kind", "form", "change"),
    [
        ("prompt_completion", "standard", {"prompt": f"  {FERRY.upper()}\n"}),
        ("preference", "conversational", {"prompt": [{"role": "user", "content": FERRY}]}),
        ("language_modeling", "conversational", {"messages": [{"role": "user", "content": FERRY}]}),
    ],
)
def test_repeated_prompt_is_told_with_its_line_and_text(kind, form, change, judged):
    result, written = judged(kind, form, {6: change}, quarantine_ratio_max=0.0)
    assert example_of(result, f"{kind}-overlap-eval").startswith("repeats held-out row 3: 'A ferry with ninety seats crosses")
    assert any(reason.startswith(f"{kind}-overlap-eval: repeats held-out row 3: ") for reason in written[0])


def test_prompt_that_is_held_out_twice_is_told_with_its_first_line(judged):
    result, _ = judged("prompt_completion", "standard", {6: {"prompt": BIRD}})
    assert example_of(result, "prompt_completion-overlap-eval") == f"repeats held-out row 1: {BIRD!r}"


def test_quoted_passage_is_told_with_the_line_it_is_of_and_a_shortened_text(judged):
    passage = " ".join(LONG.split()[20:35])
    result, written = judged("prompt_completion", "standard", {6: {"completion": f" So: {passage}, and that is all."}})
    told = example_of(result, "prompt_completion-quotes-eval")
    assert told.startswith("repeats held-out row 5: 'word0 word1 word2") and told.endswith("…'") and len(told) < 100
    assert written[0][0].startswith("prompt_completion-quotes-eval: repeats held-out row 5: ")


def test_rows_set_aside_for_several_held_out_rows_are_one_reason_with_a_count(judged):
    changes = {3: {"prompt": BIRD}, 5: {"prompt": "How deep is the lake?"}, 8: {"prompt": FERRY, "completion": " x"}}
    result, written = judged("prompt_completion", "standard", changes, quarantine_ratio_max=0.1)
    assert result.verdict.passed
    told = [[reason.split(": ")[1] for reason in reasons if "overlap" in reason] for reasons in written]
    assert told == [[f"repeats held-out row {line}"] for line in (1, 2, 3)]
    summary = example_of(result, "prompt_completion-quarantine")
    assert summary.startswith("e.g. prompt_completion-overlap-eval: repeats held-out row 1: ") and "×3" in summary


def test_quotation_within_its_limit_is_shown_with_the_held_out_row_too(judged):
    change = {6: {"completion": f" {FERRY} Nobody knows."}}
    result, written = judged("prompt_completion", "standard", change, quotes_eval_ratio_max=0.1)
    assert result.verdict.passed and not written
    assert "repeats held-out row 3" in result.verdict.to_text()
