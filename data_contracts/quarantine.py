"""Judge a source as a whole, and name every row that does not train; the rest trains only if the contract allows it.

Nothing is ever left out in silence: by default one bad row refuses the set, and with `quarantine_ratio_max` the rows that
were set aside are counted in the verdict and written down with their reasons.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.canonical import RowsFile, RowsWriter
from data_contracts.contract import QUARANTINE, Contract, judge_by, offending_rows
from data_contracts.facts import facts, prompt_hashes, prompt_passages
from data_contracts.rows import RowsRefused, SetAside, store_rows
from data_contracts.verdict import RuleResult, Verdict

FILE = "quarantine.jsonl"


@dataclass(frozen=True)
class HeldOut:
    """What no training row may repeat: the hashes of the evaluation's prompts, and the passages of each alone."""

    prompts: frozenset[str]
    passages: frozenset[str]

    @classmethod
    def of(cls, rows: pa.Table | RowsFile, kind: str) -> "HeldOut":
        return cls(frozenset(prompt_hashes(rows, kind)), prompt_passages(rows, kind))


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
    except RowsRefused:
        write(quarantine, bad)
        raise
    hidden = (held_out.prompts, held_out.passages) if held_out else ()
    more = more_facts(rows) if more_facts else None
    found = _joined(facts(rows, contract.kind, *hidden), more)
    verdict = judge_by(found, contract)
    blocking = offending_rows(found, contract, verdict)
    bad += _taken_out(rows, blocking)
    write(quarantine, bad)
    if not (allowed and bad and rows.num_rows > len(blocking)):
        return Judged(rows, found, verdict, tuple(bad))
    if blocking:
        rows = _without(rows, blocking)
        found = _joined(facts(rows, contract.kind, *hidden), more)
        verdict = judge_by(found, contract)
    return Judged(rows, found, _told(verdict, bad, contract), tuple(bad))


def write(file: Path, rows: Iterable[SetAside]) -> None:
    """Write one JSON object per row, `{"line", "reasons", "row"}` in the order of the source; no file if there is none."""
    lines = [
        json.dumps({"line": row.line, "reasons": row.reasons, "row": row.value}, ensure_ascii=False, default=str)
        for row in sorted(rows, key=lambda row: row.line)
    ]
    if lines:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _joined(found: pd.DataFrame, more: pd.DataFrame | None) -> pd.DataFrame:
    """Return the facts with more about the same rows; a row of which there are none fails as unknown."""
    return found if more is None else found.merge(more, on="row", how="left", validate="1:1")


def _taken_out(rows: RowsFile, blocking: dict[int, list[str]]) -> list[SetAside]:
    if not blocking:
        return []
    taken = (row for batch in rows.batches() for row in batch.filter(_is_among(batch, blocking)).to_pylist())
    return [SetAside(row["row"] + 1, tuple(blocking[row["row"]]), _without_number(row)) for row in taken]


def _without(rows: RowsFile, blocking: dict[int, list[str]]) -> RowsFile:
    """Put a file without these rows in the place of the file."""
    with RowsWriter(rows.path.with_name(f".{rows.path.name}")) as writer:
        for batch in rows.batches():
            writer.add(batch.filter(pc.invert(_is_among(batch, blocking))))
    return replace(writer.written(), path=writer.path.rename(rows.path))


def _is_among(batch: pa.Table, numbers: Iterable[int]) -> pa.ChunkedArray:
    return pc.is_in(batch["row"], pa.array(numbers, pa.int64()))


def _without_number(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "row"}


def _told(verdict: Verdict, bad: list[SetAside], contract: Contract) -> Verdict:
    """Return the verdict on the rest, with what was set aside, and a failed rule if that was more than allowed."""
    reasons = Counter(reason for row in bad for reason in row.reasons)
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
        example="; ".join(f"{reason} ×{count}" for reason, count in reasons.most_common(3)),
    )
    return replace(verdict, passed=verdict.passed and within, results=(*verdict.results, limit), n_set_aside=len(bad))
