"""Every bad row is named and written down; it never trains, and the rest trains only where the contract allows it."""

import json
from pathlib import Path

import pytest

from data_contracts.contract import ContractInvalid, contract_for
from data_contracts.held_out import HeldOut
from data_contracts.quarantine import Judged, judge_source
from data_contracts.rows import RowsRefused

HELD_OUT = HeldOut(frozenset({"another prompt"}), frozenset())
TIE, NO_TEXT, EMPTY = 2, 5, 8  # 0-based rows of the set below, each with a defect of its own


@pytest.fixture
def rows(clean_rows) -> list[dict]:
    rows = clean_rows("preference", "standard", 10)
    rows[TIE]["rejected"] = rows[TIE]["chosen"]
    rows[NO_TEXT]["chosen"] = 5
    rows[EMPTY]["chosen"] = " "
    return rows


@pytest.fixture
def judged(write_rows, tmp_path: Path):
    def judge(rows: list[dict] | Path, **limits: float) -> tuple[Judged, list[dict]]:
        file = tmp_path / "quarantine.jsonl"
        contract, output = contract_for("preference").with_limits(limits), tmp_path / "rows.parquet"
        source = rows if isinstance(rows, Path) else write_rows(rows)
        result = judge_source(source, contract, HELD_OUT, {}, file, output)
        return result, [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    return judge


def test_rows_of_both_sorts_of_defect_are_set_aside_with_their_reasons_and_the_rest_trains(rows, judged):
    result, written = judged(rows, quarantine_ratio_max=0.3)
    assert result.verdict.passed and result.verdict.n_set_aside == 3
    assert result.rows.table()["row"].to_pylist() == [0, 1, 3, 4, 6, 7, 9]
    assert [(row["line"], row["row"]) for row in written] == [(n + 1, rows[n]) for n in (TIE, NO_TEXT, EMPTY)]
    reasons = [row["reasons"] for row in written]
    assert (reasons[0], reasons[2]) == (["preference-tie"], ["preference-empty-text"]) and "string" in reasons[1][0]


def test_more_bad_rows_than_allowed_refuse_the_set_and_are_counted(rows, judged):
    result, written = judged(rows, quarantine_ratio_max=0.29)
    assert not result.verdict.passed and len(written) == 3
    [failure] = result.verdict.failures()
    assert (failure.rule, failure.unexpected_count, failure.total, failure.rows) == ("preference-quarantine", 3, 10, (3, 6, 9))


def test_without_leave_rows_that_break_a_rule_refuse_the_set_and_every_one_is_written_down(rows, judged):
    rows[NO_TEXT]["chosen"] = " 5."
    for row in rows[:9]:
        row["rejected"] = row["chosen"]  # nine ties: a rule's own result shows five
    result, written = judged(rows)
    assert not result.verdict.passed and result.verdict.n_set_aside == 0 and result.rows.num_rows == 10
    assert [row["line"] for row in written] == list(range(1, 10))


def test_without_leave_a_row_of_another_kind_refuses_the_source_and_is_written_down(rows, judged, tmp_path):
    with pytest.raises(RowsRefused, match="line 6"):
        judged(rows)
    (written,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(written)["line"] == NO_TEXT + 1


@pytest.mark.parametrize("share", [0.0, 0.3], ids=["refused", "allowed"])
def test_bad_rows_of_a_folder_are_told_with_their_file_and_its_line(share, rows, judged, write_rows, tmp_path):
    rows[NO_TEXT]["chosen"] = " 5."
    write_rows(rows[:4], "set/part-1.jsonl")
    folder = write_rows(rows[4:], "set/part-2.jsonl").parent
    result, written = judged(folder, quarantine_ratio_max=share)
    assert [(row["file"], row["line"]) for row in written] == [("part-1.jsonl", TIE + 1), ("part-2.jsonl", EMPTY - 3)]
    verdict = result.verdict
    for text in (verdict.to_text(), verdict.to_markdown(), verdict.to_html("x")):
        assert "part-2.jsonl:5" in text
    assert "lines part" not in verdict.to_text()


def test_bad_rows_of_a_folder_that_is_refused_are_written_with_their_file(rows, judged, write_rows, tmp_path):
    write_rows(rows[:4], "set/part-1.jsonl")
    with pytest.raises(RowsRefused, match="part-2.jsonl:2: "):
        judged(write_rows(rows[4:], "set/part-2.jsonl").parent)
    (written,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (written["file"], written["line"]) == ("part-2.jsonl", NO_TEXT - 3)


def test_source_without_a_good_row_is_refused_whatever_is_allowed(judged):
    with pytest.raises(RowsRefused):
        judged([{"prompt": "a", "chosen": 1, "rejected": "c"}] * 3, quarantine_ratio_max=1.0)


def test_set_in_which_every_row_breaks_a_rule_is_refused_whatever_is_allowed(clean_rows, judged):
    rows = [row | {"rejected": row["chosen"]} for row in clean_rows("preference", "standard", 5)]
    result, written = judged(rows, quarantine_ratio_max=1.0)
    assert not result.verdict.passed and len(written) == 5


def test_clean_set_leaves_no_file_and_no_word_of_it(clean_rows, judged):
    result, written = judged(clean_rows("preference", "standard", 10), quarantine_ratio_max=0.5)
    assert result.verdict.passed and not result.set_aside and not written
    assert "set aside" not in result.verdict.to_text() + result.verdict.to_markdown() + result.verdict.to_html("x")


def test_verdict_says_in_every_form_that_rows_were_set_aside(rows, judged):
    verdict = judged(rows, quarantine_ratio_max=0.3)[0].verdict
    for text in (verdict.to_text(), verdict.to_markdown(), verdict.to_html("x")):
        assert "3 bad rows were set aside" in text


def test_rows_that_differ_only_in_their_bad_values_are_one_reason_with_a_count(clean_rows, judged):
    rows = clean_rows("preference", "standard", 20)
    for n, row in enumerate(rows[:9]):
        row["chosen"] = n + 0.5
    rows[9]["rejected"] = ["a", "list"]
    verdict = judged(rows, quarantine_ratio_max=0.6)[0].verdict
    [set_aside] = [it for it in verdict.results if it.rule == "preference-quarantine"]
    assert set_aside.example.startswith("e.g. chosen must be a string, not float 0.5 ×9; rejected must be a string")


@pytest.mark.parametrize("share", [-0.1, 1.1, True])
def test_share_that_is_none_is_refused(share):
    with pytest.raises(ContractInvalid, match="quarantine_ratio_max"):
        contract_for("preference").with_limits({"quarantine_ratio_max": share})


def test_page_of_a_verdict_loads_nothing_and_escapes_what_it_shows(rows, judged):
    page = judged(rows, quarantine_ratio_max=0.3)[0].verdict.to_html("<script>alert(1)</script>")
    assert "<script" not in page and "http" not in page
