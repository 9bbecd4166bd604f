"""Judge a source as a whole, and name every row that does not train; the rest trains only if the contract allows it.

Nothing is ever left out in silence: by default one bad row refuses the set, and with `quarantine_ratio_max` the rows that
were set aside are counted in the verdict and written down with their reasons.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.canonical import RowsFile, RowsWriter
from data_contracts.contract import QUARANTINE, Contract, judge_by, offending_rows
from data_contracts.facts import facts
from data_contracts.held_out import LEAKS, HeldOut
from data_contracts.places import Places
from data_contracts.reasons import by_sort, shortened
from data_contracts.rows import RowsRefused, SetAside, store_rows
from data_contracts.verdict import RuleResult, Verdict

FILE = "quarantine.jsonl"
_SORTS_SHOWN = 3
_REASON_CHARS = 120


@dataclass(frozen=True)
class Judged:
    """The rows that train if the verdict passed, the facts about them, and every row that blocks or was set aside."""

    rows: RowsFile
    facts: pd.DataFrame
    verdict: Verdict
    set_aside: tuple[SetAside, ...]

    def columns(self) -> dict[str, str]:
        """Return the types of the rows' own columns."""
        return {field.name: str(field.type) for field in self.rows.schema if field.name != "row"}

    def with_more(self, results: list[RuleResult]) -> "Judged":
        """Return the same with more rules in the verdict."""
        passed = self.verdict.passed and not any(result.status in ("ERROR", "FAIL") for result in results)
        return replace(self, verdict=replace(self.verdict, passed=passed, results=(*self.verdict.results, *results)))


def judge_source(
    source: Path,
    contract: Contract,
    held_out: HeldOut | None,
    reading: Mapping[str, Any],
    quarantine: Path,
    output: Path,
    more_facts: Callable[[RowsFile], pd.DataFrame] | None = None,
) -> Judged:
    """Write the rows of a source that train into the Parquet file `output` and judge them.

    `reading` is how `store_rows` reads the source, `more_facts` returns facts by `row`. Rows that are not of their kind, or for
    which a blocking rule does not hold, are written to the file `quarantine`, whether the set is refused for them or trains
    without them. Raises RowsRefused where the source cannot be read as asked.
    """
    allowed = contract.quarantine_ratio_max > 0
    bad: list[SetAside] = []
    try:
        rows = store_rows(source, contract.kind, output, **reading, set_aside=bad, keep_rest=allowed)
    except RowsRefused as error:
        write(quarantine, bad, error.places)
        raise
    hidden = (held_out.prompts, held_out.passages) if held_out else ()
    more = more_facts(rows) if more_facts else None
    found = _joined(facts(rows, contract.kind, *hidden), more)
    verdict = judge_by(found, contract)
    blocking = offending_rows(found, contract, verdict)
    bad += _taken_out(rows, blocking, _repeated(rows, contract, held_out, blocking))
    write(quarantine, bad, rows.places)
    if not (allowed and bad and rows.num_rows > len(blocking)):
        return Judged(rows, found, _placed(_exemplified(verdict, rows, held_out), rows.places), tuple(bad))
    if blocking:
        rows = _without(rows, blocking)
        found = _joined(facts(rows, contract.kind, *hidden), more)
        verdict = judge_by(found, contract)
    verdict = _told(_exemplified(verdict, rows, held_out), bad, contract)
    return Judged(rows, found, _placed(verdict, rows.places), tuple(bad))


def write(file: Path, rows: Iterable[SetAside], places: Places) -> None:
    """Write one JSON object per row, `{"line", "reasons", "row"}` in the order of the source; no file if there is none.

    Where the source is several files, `file` stands before the line, which is then the line in that file.
    """
    lines = []
    for row in sorted(rows, key=lambda row: row.line):
        name, line = places.find(row.line)
        said = ({"file": name} if name else {}) | {"line": line, "reasons": row.reasons, "row": row.value}
        lines.append(json.dumps(said, ensure_ascii=False, default=str))
    if lines:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _joined(found: pd.DataFrame, more: pd.DataFrame | None) -> pd.DataFrame:
    """Return the facts with more about the same rows; a row of which there are none fails as unknown."""
    return found if more is None else found.merge(more, on="row", how="left", validate="1:1")


def _repeated(
    rows: RowsFile, contract: Contract, held_out: HeldOut | None, blocking: dict[int, list[str]]
) -> dict[tuple[int, str], str]:
    """Return which held-out row each row repeats that blocks for that, by the row's number and the rule."""
    rules = {rule["meta"]["rule"] for rule in contract.expectations if rule["kwargs"].get("column") in LEAKS}
    leaking = [(row, rule) for row, broken in blocking.items() for rule in broken if rule in rules]
    named = held_out.found_in(rows, contract.kind, (row for row, _ in leaking)) if held_out else {}
    return {(row, rule): named[row] for row, rule in leaking if row in named}


def _exemplified(verdict: Verdict, rows: RowsFile, held_out: HeldOut | None) -> Verdict:
    """Return the verdict with the held-out row, where one is repeated, as the example: that it is, the rule has said."""
    first = {result.rule: result.rows[0] - 1 for result in verdict.results if result.column in LEAKS and result.rows}
    named = held_out.found_in(rows, verdict.kind, first.values()) if held_out else {}
    results = (replace(it, example=named.get(first.get(it.rule), it.example)) for it in verdict.results)
    return replace(verdict, results=tuple(results))


def _taken_out(rows: RowsFile, blocking: dict[int, list[str]], repeated: Mapping[tuple[int, str], str]) -> list[SetAside]:
    if not blocking:
        return []
    taken = (row for batch in rows.batches() for row in batch.filter(_is_among(batch, blocking)).to_pylist())
    return [SetAside(row["row"] + 1, _reasons(row["row"], blocking, repeated), _without_number(row)) for row in taken]


def _reasons(row: int, blocking: dict[int, list[str]], repeated: Mapping[tuple[int, str], str]) -> tuple[str, ...]:
    return tuple(f"{rule}: {repeated[row, rule]}" if (row, rule) in repeated else rule for rule in blocking[row])


def _without(rows: RowsFile, blocking: dict[int, list[str]]) -> RowsFile:
    """Put a file without these rows in the place of the file."""
    with RowsWriter(rows.path.with_name(f".{rows.path.name}")) as writer:
        for batch in rows.batches():
            writer.add(batch.filter(pc.invert(_is_among(batch, blocking))))
    writer.path.rename(rows.path)
    return replace(rows, num_rows=writer.num_rows)


def _is_among(batch: pa.Table, numbers: Iterable[int]) -> pa.ChunkedArray:
    return pc.is_in(batch["row"], pa.array(numbers, pa.int64()))


def _without_number(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "row"}


def _placed(verdict: Verdict, places: Places) -> Verdict:
    """Return the verdict with the file in each row's place, where the source is several."""
    return replace(verdict, results=tuple(replace(it, rows=places.shown(it.rows)) for it in verdict.results))


def _told(verdict: Verdict, bad: list[SetAside], contract: Contract) -> Verdict:
    """Return the verdict on the rest, with what was set aside, and a failed rule if that was more than allowed."""
    sorts = by_sort(reason for row in bad for reason in row.reasons)
    most = sorted(sorts, key=lambda reason: -len(sorts[reason]))[:_SORTS_SHOWN]
    total = verdict.n_rows + len(bad)
    share = len(bad) / total
    within = share <= contract.quarantine_ratio_max
    limit = RuleResult(
        rule=f"{contract.kind}-quarantine",
        severity="critical",
        status="PASS" if within else "FAIL",
        harm=f"more rows are bad than {QUARANTINE} {contract.quarantine_ratio_max} lets be set aside: the rest is another set",
        unexpected_count=len(bad),
        total=total,
        rows=tuple(sorted(row.line for row in bad)[:5]),
        example="; ".join(f"{shortened(reason, _REASON_CHARS)} ×{len(sorts[reason]):,}" for reason in most),
    )
    return replace(verdict, passed=verdict.passed and within, results=(*verdict.results, limit), n_set_aside=len(bad))
