"""Run expectations through Great Expectations so that what it lets slip fails here.

GX 1.24 by itself drops an expectation with an unknown type or severity (its PR #10248), succeeds on an empty suite and
on an empty table, leaves nulls out before it tests, and reports a rule that could not run like one that failed. Each
expectation is therefore built alone and counted, and each result is looked at. `contract.py` sees to the rest: rules
against nulls and empty tables in every contract, and no `$` in a regular expression.
"""

import difflib
import json
import logging
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyarrow.dataset

from data_contracts.spark import Spark, spelled
from data_contracts.verdict import RuleResult

Facts = pd.DataFrame | Path  # a frame, or the Parquet file or folder of files that holds it where it outgrows memory

_ROWS_SHOWN = 5
# BOOLEAN_ONLY could not be told from an error
_SUMMARY = {"result_format": "SUMMARY", "unexpected_index_column_names": ["row"], "partial_unexpected_count": _ROWS_SHOWN}
_COMPLETE = _SUMMARY | {"result_format": "COMPLETE"}  # every row
_COUNTS = {"result_format": "BASIC", "partial_unexpected_count": 0}  # no row: GX looks each of them up, one by one
_HEAD = 1000  # rows among which a rule that many rows break has enough to show
# GX keeps its current context in one slot per process and promises nothing to threads, and `_quiet` sets a level for all of
# them. Without this lock 20 judgements in 6 threads still went well; it costs a second of waiting.
_GX_CONTEXT = threading.Lock()
_CHATTY = ("great_expectations", "great_expectations.data_context.types.base")  # the second has a level of its own


class ContractInvalid(ValueError):
    """A contract or a limit set on it is not usable; the data have not been judged."""


def run(expectations: list[dict], facts: Facts, name: str, spark: Spark | None = None) -> tuple[list[RuleResult], dict]:
    """Return one result per expectation, in their order, and GX's own result ready for JSON.

    pandas judges, or Spark if it is given: the results are the same.
    """
    facts = _frame(facts) if spark is None else facts
    raw = _counted(expectations, facts, name, spark)
    by_rule = {_rule(result): result for result in raw.results}
    n_rows = num_rows(facts)
    results = [_result(expectation, by_rule[expectation["meta"]["rule"]], n_rows) for expectation in expectations]
    return results, _plain_json(raw.to_json_dict())


def offending_rows(expectations: list[dict], facts: Facts, name: str, spark: Spark | None = None) -> dict[int, list[str]]:
    """Return every row that some of these rules does not hold for: its number, and the rules.

    A rule about the whole set (a count, a minimum) names no row.
    """
    rows: dict[int, list[str]] = defaultdict(list)
    for result in _judged(expectations, facts, name, _COMPLETE, spark).results:
        for found in (result.result or {}).get("unexpected_index_list") or []:
            rows[int(found["row"])].append(_rule(result))
    return dict(rows)


def num_rows(facts: Facts) -> int:
    """Return how many rows there are facts about."""
    return len(facts) if isinstance(facts, pd.DataFrame) else pyarrow.dataset.dataset(facts).count_rows()


def _counted(expectations: list[dict], facts: Facts, name: str, spark: Spark | None):
    """Return GX's result. To show rows costs more than to count them: only rules that found some show them."""
    raw = _judged(expectations, facts, name, _COUNTS, spark)
    counts = {_rule(result): (result.result or {}).get("unexpected_count") for result in raw.results}
    wanted = {rule: min(count, _ROWS_SHOWN) for rule, count in counts.items() if count}
    for part in [facts] if spark else [facts.head(_HEAD), facts]:
        again = [expectation for expectation in expectations if expectation["meta"]["rule"] in wanted]
        for shown in _judged(again, part, name, _SUMMARY, spark).results if again else []:
            rows = (shown.result or {}).get("partial_unexpected_index_list") or []
            if part is facts or len(rows) >= wanted[_rule(shown)]:
                counted = next(result for result in raw.results if _rule(result) == _rule(shown))
                counted.result["partial_unexpected_index_list"] = rows
                del wanted[_rule(shown)]
    return raw


def _rule(result) -> str:
    return result.expectation_config.meta["rule"]


def _judged(expectations: list[dict], facts: Facts, name: str, detail: dict, spark: Spark | None = None):
    """Return GX's result, which has every rule that went in."""
    if not expectations:
        raise ContractInvalid(f"contract {name} has no expectations, and an empty suite passes everything")
    import great_expectations as gx  # here and not above: 5 s and 260 MB that only a judgement pays

    with _GX_CONTEXT, _quiet():  # after the import, which sets the level of GX's logger itself
        raw = _validate(gx, expectations, facts, name, detail, spark)
    judged = {_rule(result) for result in raw.results}
    asked = [expectation["meta"]["rule"] for expectation in expectations]
    if len(raw.results) != len(asked) or judged != set(asked):
        lost = sorted(set(asked) - judged)
        raise ContractInvalid(f"contract {name}: {len(asked)} rules went in and {len(raw.results)} came back; lost {lost}")
    return raw


def _validate(gx, expectations: list[dict], facts: Facts, name: str, detail: dict, spark: Spark | None):
    """Return GX's result of all expectations on the facts, in a context that leaves nothing on disk."""
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    for expectation in expectations:
        _refuse_dropped(gx, expectation, name)
    if spark is None:
        source, table = context.data_sources.add_pandas("facts"), _frame(facts)
    else:
        source, table = context.data_sources.add_spark("facts", persist=False), spark.table(facts)
        expectations = spelled(expectations, table.columns)
    suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
    asset = source.add_dataframe_asset("facts")
    batch = asset.add_batch_definition_whole_dataframe("facts")
    validation = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
    return validation.run(batch_parameters={"dataframe": table}, result_format=detail)


def _frame(facts: Facts) -> pd.DataFrame:
    return facts if isinstance(facts, pd.DataFrame) else pd.read_parquet(facts).sort_values("row", ignore_index=True)


def _refuse_dropped(gx, expectation: dict, name: str) -> None:
    """Build one expectation alone, because in company a bad one is dropped with no more than a logged line."""
    rule, kind = expectation["meta"]["rule"], expectation["type"]
    try:
        kept = len(gx.ExpectationSuite(name=f"{rule} alone", expectations=[expectation]).expectations)
    except Exception as error:  # GX raises pydantic's, its own and bare ones here, and each means the same
        raise ContractInvalid(f"contract {name}, rule {rule}: {kind} {expectation['kwargs']}: {error}") from error
    if kept != 1:
        raise ContractInvalid(f"contract {name}, rule {rule}: Great Expectations drops {kind!r}{_nearest(kind)}")


def _nearest(kind: str) -> str:
    from great_expectations.expectations.registry import list_registered_expectation_implementations

    known = list_registered_expectation_implementations()
    if kind in known:
        return ", though it knows the type: look at its severity and its keys"
    near = difflib.get_close_matches(kind, known, n=3)
    return f". Did you mean {' or '.join(near)}?" if near else ", which it does not know"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep GX's log lines out of the run's log: what they say is raised here."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _CHATTY)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _result(expectation: dict, raw, n_rows: int) -> RuleResult:
    found = raw.result or {}
    error = _error(raw, found, n_rows)
    severity = expectation["severity"]
    failed = "FAIL" if severity == "critical" else "WARN"
    examples = found.get("partial_unexpected_index_list") or []
    column = expectation["kwargs"].get("column")
    return RuleResult(
        rule=expectation["meta"]["rule"],
        severity=severity,
        status="ERROR" if error else "PASS" if raw.success else failed,
        harm=expectation["notes"],
        limit=expectation["meta"].get("limit", ""),
        column=column,
        unexpected_count=(found["unexpected_count"] or 0) if "unexpected_count" in found else None,  # Spark: null of no rows
        total=found.get("element_count"),
        rows=tuple(int(example["row"]) + 1 for example in examples[:_ROWS_SHOWN] if pd.notna(example["row"])),
        example=_example(column, examples[0][column]) if examples else None,
        observed=error or _scalar(found.get("observed_value")),
    )


def _example(column: str, value: object) -> str:
    value = None if pd.isna(value) else _scalar(value)  # the engines spell null in three ways
    return f"{column}={value!r}" if len(repr(value)) <= 60 else f"{column}={repr(value)[:59]}…"


def _error(raw, found: dict, n_rows: int) -> str | None:
    """Return why a rule could not be judged, or None."""
    if not found:
        said = (info["exception_message"] for info in raw.exception_info.values() if isinstance(info, dict))
        return f"could not be judged: {next(said, None) or 'no result'}"[:300]
    if found.get("element_count", n_rows) != n_rows:
        return f"looked at {found['element_count']} of {n_rows} rows"
    return None


def _scalar(value: object) -> object:
    return value.item() if hasattr(value, "item") else value


def _plain_json(result: dict) -> dict:
    """Return GX's result with NaN and infinity, which are no JSON, as null."""
    return json.loads(json.dumps(result, default=str), parse_constant=lambda _: None)
