"""Spark judges as pandas does: the same statuses, counts, first rows, examples and offending rows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from data_contracts import spark as on_spark
from data_contracts.contract import Contract, contract_for, judge_by, offending_rows, read_contract
from data_contracts.facts import facts
from data_contracts.kinds import KINDS
from data_contracts.rows import read_rows
from data_contracts.spark import Spark, SparkUnusable, started
from data_contracts.verdict import RuleResult, Verdict
from profiles.schema import Dataset, StagePlacement
from tasks.artifacts import Artifact
from tasks.errors import ProfileError
from tasks.token_facts import Tokens
from tasks.validate_data import hold_to_contract, identify

WHY_NOT = on_spark.missing()
needs_spark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
pytestmark = [pytest.mark.spark, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def spark() -> Iterator[Spark]:
    with started("local[2]") as running:
        yield running


@pytest.fixture
def verdict_of_both(spark):
    """Judge facts on both engines, and return the verdict once it is seen to be one."""

    def judge(found, contract: Contract) -> Verdict:
        other = replace(contract, spark=spark)
        expected, verdict = judge_by(found, contract), judge_by(found, other)
        assert [_levelled(result) for result in verdict.results] == [_levelled(result) for result in expected.results]
        assert (verdict.passed, verdict.n_rows) == (expected.passed, expected.n_rows)
        assert offending_rows(found, other, verdict) == offending_rows(found, contract, expected)
        return verdict

    return judge


def _levelled(result: RuleResult) -> RuleResult:
    """Return a result without an engine's own words for why it could not judge."""
    return replace(result, observed=None) if result.status == "ERROR" else result


@pytest.fixture
def facts_of(write_rows, clean_rows):
    def make(kind: str, form: str = "conversational", changes: dict[int, dict] | None = None, count: int = 12) -> pd.DataFrame:
        rows = [row | (changes or {}).get(n, {}) for n, row in enumerate(clean_rows(kind, form, count))]
        return facts(read_rows(write_rows(rows), kind), kind, {"another prompt"})

    return make


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


@needs_spark
@pytest.mark.parametrize("kind", KINDS)
def test_clean_rows_of_every_kind_are_accepted_by_both(kind, facts_of, verdict_of_both):
    form = "conversational" if KINDS[kind].conversational else "standard"
    verdict = verdict_of_both(facts_of(kind, form), contract_for(kind))
    assert {result.status for result in verdict.results} == {"PASS"}


USER, REPLY = [turn("user", "Say 6")], [turn("assistant", "6.")]
DEFECTS = {
    "turn order": ("language_modeling", {6: {"messages": USER + REPLY + USER}, 9: {"messages": USER}}, ["turn-order"]),
    "prompt order": (
        "prompt_completion",
        {3: {"prompt": REPLY}, 4: {"completion": USER}},
        ["prompt-order", "completion-order"],
    ),
    "ties": ("preference", {n: {"chosen": REPLY, "rejected": REPLY} for n in range(2, 9)}, ["tie"]),
    "empty text, echo": ("prompt_completion", {2: {"completion": [turn("assistant", " ")]}}, ["empty-text"]),
    "control marker": ("prompt_only", {7: {"prompt": [turn("user", "Say 7<|im_end|>")]}}, ["control-marker"]),
    "length outliers": ("preference", {n: {"chosen": [turn("assistant", "x" * 900)]} for n in (1, 5)}, ["length-outlier"]),
    "labels": ("unpaired_preference", {n: {"label": True} for n in range(12)}, ["both-labels", "label-balance"]),
    "duplicates": ("eval", {n: {"prompt": [turn("user", "Say 0")]} for n in (4, 8)}, ["duplicate-prompt", "rival-answer"]),
}


@needs_spark
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found_by_both_at_the_same_rows(name, facts_of, verdict_of_both):
    kind, changes, rules = DEFECTS[name]
    verdict = verdict_of_both(facts_of(kind, changes=changes), contract_for(kind))
    spoke = {result.rule.removeprefix(f"{kind}-") for result in verdict.results if result.status != "PASS"}
    assert set(rules) <= spoke


FACTS = {
    "no rows": lambda found: found.iloc[:0],
    "missing column": lambda found: found.drop(columns="is_tie"),
    "nulls": lambda found: found.assign(
        is_tie=None,
        prompt_hash=None,
        prompt_roles=found["prompt_roles"].where(found["row"] != 4),
        len_ratio=found["len_ratio"].where(found["row"] != 7),
        is_duplicate=found["is_duplicate"].where(found["row"] < 6),
    ),
    "trailing newline": lambda found: found.assign(prompt_roles=found["prompt_roles"] + "\n"),
    "infinite ratio": lambda found: found.assign(len_ratio=float("inf")),
}


@needs_spark
@pytest.mark.parametrize("name", FACTS)
def test_facts_that_are_wrong_themselves_are_told_alike_by_both(name, facts_of, verdict_of_both):
    verdict = verdict_of_both(FACTS[name](facts_of("preference")), contract_for("preference"))
    assert {result.status for result in verdict.results} != {"PASS"}


@needs_spark
def test_rule_that_cannot_be_judged_is_an_error_that_leaves_the_others_alone(tmp_path, facts_of, verdict_of_both):
    spec = yaml.safe_load((Path(on_spark.__file__).with_name("preference.yaml")).read_text())
    rules = {rule["meta"]["rule"]: rule["kwargs"] for rule in spec["expectations"]}
    rules["preference-prompt-order"]["regex"] = "(("
    rules["preference-held-out-known"]["column"] = "prompt_roles"
    (tmp_path / "preference.yaml").write_text(yaml.safe_dump(spec))
    verdict = verdict_of_both(facts_of("preference"), read_contract(tmp_path / "preference.yaml"))
    errors = [result.rule for result in verdict.results if result.status == "ERROR"]
    assert errors == ["preference-prompt-order", "preference-held-out-known"]


@needs_spark
def test_facts_in_several_files_show_their_first_rows_in_order(tmp_path, facts_of, verdict_of_both):
    """Spark reads the largest file first: its rows come first unless all are put in order."""
    folder = tmp_path / "facts"
    folder.mkdir()
    found = facts_of("eval", changes={n: {"answer": ""} for n in range(60, 300)}, count=300)
    found.iloc[:100].to_parquet(folder / "small.parquet", index=False)
    found.iloc[100:].to_parquet(folder / "large.parquet", index=False)
    [empty] = [result for result in verdict_of_both(folder, contract_for("eval")).failures() if "empty" in result.rule]
    assert (empty.rows, empty.unexpected_count) == ((61, 62, 63, 64, 65), 240)


@needs_spark
def test_dataset_with_engine_spark_is_judged_and_set_aside_as_by_pandas(tmp_path, write_rows, clean_rows, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_SPARK_MASTER", "local[2]")
    rows = clean_rows("eval", "standard", 10)
    rows[6]["answer"] = ""
    verdicts = []
    for engine in ("pandas", "spark"):
        dataset = Dataset(path=str(write_rows(rows)), kind="eval", engine=engine, contract={"quarantine_ratio_max": 0.2})
        (tmp_path / engine).mkdir()
        folder = tmp_path / engine
        verdicts.append(hold_to_contract(dataset, tmp_path / "rows.jsonl", None, folder, folder, None).verdict.to_dict())
    assert verdicts[0] == verdicts[1]
    assert (verdicts[0]["n_rows"], verdicts[0]["n_set_aside"], verdicts[0]["passed"]) == (9, 1, True)


def test_engine_of_a_dataset_is_no_part_of_what_it_is(tmp_path, write_rows, clean_rows):
    source = write_rows(clean_rows("eval", "standard", 3))
    tokens = Tokens(Artifact("model", str(tmp_path), "0" * 12, "", {}, {}, ""), [], StagePlacement())
    pandas, spark = (Dataset(path=str(source), kind="eval", engine=engine) for engine in ("pandas", "spark"))
    assert identify(pandas, source, None, tokens) == identify(spark, source, None, tokens)


def test_dataset_with_engine_spark_without_java_is_told_what_to_install(tmp_path, write_rows, clean_rows, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    source = write_rows(clean_rows("eval", "standard", 3))
    with pytest.raises(ProfileError, match="Install"):
        hold_to_contract(Dataset(path=str(source), kind="eval", engine="spark"), source, None, tmp_path, tmp_path, None)


@needs_spark
def test_cluster_without_a_folder_for_the_facts_is_refused_before_it_is_asked():
    with pytest.raises(SparkUnusable, match="folder"), started("spark://cluster.invalid:7077"):
        pass
