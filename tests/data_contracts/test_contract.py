"""Contracts refuse the rows they should, by the rule that they should, at the lines where they stand."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_contracts.contract import ContractInvalid, contract_for, judge
from data_contracts.facts import fact_columns, facts
from data_contracts.held_out import HeldOut
from data_contracts.kinds import KINDS
from data_contracts.rows import read_rows


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def verdict_of(write_rows):
    def read_and_judge(rows: list[dict], kind: str, held_out=None, **limits):
        return judge(facts(read_rows(write_rows(rows), kind), kind, held_out), kind, limits)

    return read_and_judge


def status(verdict) -> dict[str, str]:
    return {result.rule.removeprefix(f"{verdict.kind}-"): result.status for result in verdict.results}


@pytest.mark.parametrize("kind", KINDS)
def test_contract_of_every_kind_is_shipped_with_a_harm_for_each_rule(kind):
    contract = contract_for(kind)
    assert contract.kind == kind
    assert all(len(rule["notes"].split()) >= 8 for rule in contract.expectations)
    named = {rule["kwargs"]["column"] for rule in contract.expectations if "column" in rule["kwargs"]}
    assert named <= set(fact_columns(kind))


def test_verdict_on_clean_rows_of_every_kind_is_accepted_without_a_word(kind_and_form, clean_rows, verdict_of):
    verdict = verdict_of(clean_rows(*kind_and_form, 10), kind_and_form[0], held_out={"another prompt"})
    assert verdict.passed
    assert {result.status for result in verdict.results} == {"PASS"}
    assert verdict.n_rows == 10


EMPTY = {"role": "assistant", "content": " \n"}
MARKED = assistant("six<|im_end|>")
DEFECTS = [
    ("language_modeling", {"messages": user("Say 6") + assistant("6.") + user("Thanks")}, "turn-order"),
    ("language_modeling", {"messages": user("Say 6") + user("now") + assistant("6.")}, "turn-order"),
    ("language_modeling", {"messages": [*user("Say 6"), EMPTY]}, "empty-text"),
    ("language_modeling", {"messages": user("Say 6") + MARKED}, "control-marker"),
    ("prompt_completion", {"prompt": assistant("Say 6")}, "prompt-order"),
    ("prompt_completion", {"prompt": [*user("Say 6"), {"role": "system", "content": "Be brief."}]}, "prompt-order"),
    ("prompt_completion", {"completion": assistant("6.") + user("Thanks")}, "completion-order"),
    ("prompt_completion", {"completion": [EMPTY]}, "empty-text"),
    ("prompt_completion", {"completion": assistant("Say 6")}, "echo"),
    ("preference", {"prompt": user("Say 6") + assistant("No")}, "prompt-order"),
    ("preference", {"chosen": user("6.")}, "chosen-order"),
    ("preference", {"rejected": user("6.")}, "rejected-order"),
    ("preference", {"rejected": assistant("Gladly, here it is: 6.")}, "tie"),
    ("preference", {"rejected": [EMPTY]}, "empty-text"),
    ("preference", {"chosen": MARKED}, "control-marker"),
    ("preference", {"chosen": assistant("No")}, "chosen-cut"),
    ("preference", {"rejected": assistant("Gladly")}, "rejected-cut"),
    ("preference", {"chosen": assistant("x" * 500)}, "length-outlier"),
    ("prompt_only", {"prompt": user("Say 6") + assistant("6.")}, "prompt-order"),
    ("prompt_only", {"prompt": user("Say {{number}}")}, "placeholder"),
    ("prompt_only", {"prompt": user("Say 0")}, "duplicate-prompt"),
    ("eval", {"answer": ""}, "empty-text"),
    ("eval", {"prompt": user("Say 0"), "answer": "0"}, "duplicate-prompt"),
]


@pytest.mark.parametrize(("kind", "change", "rule"), DEFECTS, ids=[f"{kind}-{rule}" for kind, _, rule in DEFECTS])
def test_verdict_on_one_defect_names_its_rule_and_line(kind, change, rule, clean_rows, verdict_of):
    rows = clean_rows(kind, "conversational", 10)
    rows[6] = rows[6] | change
    verdict = verdict_of(rows, kind, held_out={"another prompt"})
    spoke = {result.rule.removeprefix(f"{kind}-"): result for result in verdict.results if result.status != "PASS"}
    assert rule in spoke
    assert (spoke[rule].rows, spoke[rule].unexpected_count, spoke[rule].total) == ((7,), 1, 10)
    assert verdict.passed == all(result.severity == "warning" for result in spoke.values())


def test_verdict_on_an_overlap_is_refused_and_on_none_known_warned(clean_rows, write_rows, verdict_of):
    rows = clean_rows("prompt_only", "standard", 10)
    held_out = HeldOut.of(read_rows(write_rows([{"prompt": "say 6", "answer": "6"}]), "eval"), "eval").prompts
    [overlap] = verdict_of(rows, "prompt_only", held_out=held_out).failures()
    assert (overlap.rule, overlap.rows) == ("prompt_only-overlap-eval", (7,))
    unknown = verdict_of(rows, "prompt_only")
    assert unknown.passed
    assert status(unknown)["held-out-known"] == "WARN"


def test_limit_lets_exactly_its_share_pass(clean_rows, verdict_of):
    rows = clean_rows("preference", "standard", 10)
    for row in rows[:3]:
        row["chosen"] = row["rejected"]
    assert verdict_of(rows, "preference", ties_ratio_max=0.3).passed  # 1 - 0.7 > 0.3 in floating point
    assert status(verdict_of(rows, "preference", ties_ratio_max=0.29))["tie"] == "FAIL"


def test_limit_that_is_tightened_refuses_more_and_loosened_is_told(clean_rows, verdict_of):
    rows = clean_rows("eval", "standard", 10)
    tight = verdict_of(rows, "eval", rows_min=11)
    assert status(tight)["rows"] == "FAIL"
    assert (tight.passed, tight.loosened) == (False, ())
    loose = verdict_of([*rows, rows[0]], "eval", duplicate_prompt_ratio_max=0.1)
    assert loose.passed
    assert "duplicate_prompt_ratio_max" in loose.to_markdown()
    assert len(loose.loosened) == 1


def test_limit_of_an_unknown_name_is_told_its_neighbours():
    with pytest.raises(ContractInvalid, match="ties_ratio_max"):
        contract_for("preference").with_limits({"tie_ratio_max": 0.1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows_min", 0),
        ("rows_min", 1.5),
        ("ties_ratio_max", 2),
        ("ties_ratio_max", -0.1),
        ("ties_ratio_max", True),
        ("ties_ratio_max", "0.1"),
        ("ties_ratio_max", float("nan")),
        ("length_factor_max", 0),
    ],
)
def test_limit_that_could_not_hold_is_refused(name, value):
    with pytest.raises(ContractInvalid, match=name):
        contract_for("preference").with_limits({name: value})


def test_contract_of_an_unknown_kind_is_refused():
    with pytest.raises(ContractInvalid, match="preference"):
        contract_for("preferences")


def test_verdict_is_json_and_a_table_that_names_the_lines(clean_rows, verdict_of):
    rows = clean_rows("preference", "standard", 10)
    for number in range(2, 9):
        rows[number]["chosen"] = rows[number]["rejected"]
    verdict = verdict_of(rows, "preference")
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["passed"] is False
    assert json.loads(json.dumps(verdict.gx_result, allow_nan=False))["success"] is False
    [tie] = verdict.failures()
    assert (tie.rows, tie.unexpected_count, tie.example) == ((3, 4, 5, 6, 7), 7, "is_tie=True")
    [line] = [line for line in verdict.to_markdown().splitlines() if "preference-tie" in line]
    assert all(word in line for word in ("FAIL", "7 of 10", "3, 4, 5, 6, 7", tie.harm[:20]))


def test_verdicts_of_several_kinds_at_once_are_each_their_own(write_rows, clean_rows):
    """Prefect runs submitted tasks in threads, and Great Expectations has one current context per process."""
    tables = {kind: facts(read_rows(write_rows(clean_rows(kind, "standard", 9)), kind), kind) for kind in KINDS}
    with ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(lambda kind: judge(tables[kind], kind), tables))
    assert [verdict.kind for verdict in verdicts] == list(tables)
    assert all(verdict.passed for verdict in verdicts)


@pytest.mark.parametrize(
    ("name", "kind", "layout", "refused_by"),
    [
        ("dpo_en_demo", "preference", "sharegpt", []),
        ("alpaca_en_demo", "prompt_completion", "alpaca", []),
        ("alpaca_en_demo", "language_modeling", "alpaca", []),
        ("alpaca_en_demo", "eval", "alpaca", ["eval-duplicate-prompt"]),  # 14 of 999, and none is allowed
        ("identity", "prompt_completion", "alpaca", ["prompt_completion-placeholder"]),  # 85 of 91 say {{name}}
    ],
)
def test_verdict_on_real_sets_is_what_is_known_of_them(name, kind, layout, refused_by, shared_data):
    table = read_rows(shared_data / "llama-factory-demo" / f"{name}.json", kind, layout=layout)
    verdict = judge(facts(table, kind), kind)
    assert [result.rule for result in verdict.failures()] == refused_by
