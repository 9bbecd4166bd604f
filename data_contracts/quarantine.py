"""Judge a source as a whole, and name every row that does not train; the rest trains only if the contract allows it.

Nothing is ever left out in silence: by default one bad row refuses the set, and with `quarantine_ratio_max` the rows that
were set aside are counted in the verdict and written down with their reasons.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.contract import QUARANTINE, Contract, judge_by, offending_rows
from data_contracts.facts import facts, prompt_hashes, prompt_passages
from data_contracts.rows import RowsRefused, SetAside, read_rows
from data_contracts.verdict import RuleResult, Verdict

FILE = "quarantine.jsonl"


@dataclass(frozen=True)
class HeldOut:
    """What no training row may repeat: the hashes of the evaluation's prompts, and the passages of each alone."""

    prompts: frozenset[str]
    passages: frozenset[str]

    @classmethod
    def of(cls, table: pa.Table, kind: str) -> "HeldOut":
        return cls(frozenset(prompt_hashes(table, kind)), prompt_passages(table, kind))


@dataclass(frozen=True)
class Judged:
    """The rows that train if the verdict passed, the verdict on them, and every row that is not among them or blocks."""

    table: pa.Table
    verdict: Verdict
    set_aside: tuple[SetAside, ...]


def judge_source(
    source: Path, contract: Contract, held_out: HeldOut | None, reading: Mapping[str, Any], quarantine: Path
) -> Judged:
    """Read a source and judge its rows; `reading` is how `read_rows` reads it.

    Rows that are not of their kind, or for which a blocking rule does not hold, are written to the file `quarantine`, whether
    the set is refused for them or trains without them. Raises RowsRefused where the source cannot be read as asked.
    """
    allowed = contract.quarantine_ratio_max > 0
    bad: list[SetAside] = []
    try:
        table = read_rows(source, contract.kind, **reading, set_aside=bad, keep_rest=allowed)
    except RowsRefused:
        write(quarantine, bad)
        raise
    hidden = (held_out.prompts, held_out.passages) if held_out else ()
    found = facts(table, contract.kind, *hidden)
    verdict = judge_by(found, contract)
    blocking = offending_rows(found, contract, verdict)
    rest = table.filter(pc.invert(pc.is_in(table["row"], pa.array(list(blocking), pa.int64())))) if blocking else table
    bad += _taken_out(table, blocking)
    write(quarantine, bad)
    if allowed and bad and rest.num_rows:
        verdict = judge_by(facts(rest, contract.kind, *hidden), contract) if blocking else verdict
        return Judged(rest, _told(verdict, bad, contract), tuple(bad))
    return Judged(table, verdict, tuple(bad))


def write(file: Path, rows: Iterable[SetAside]) -> None:
    """Write one JSON object per row, `{"line", "reasons", "row"}` in the order of the source; no file if there is none."""
    lines = [
        json.dumps({"line": row.line, "reasons": row.reasons, "row": row.value}, ensure_ascii=False, default=str)
        for row in sorted(rows, key=lambda row: row.line)
    ]
    if lines:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _taken_out(table: pa.Table, blocking: dict[int, list[str]]) -> list[SetAside]:
    rows = table.filter(pc.is_in(table["row"], pa.array(list(blocking), pa.int64()))).to_pylist() if blocking else []
    return [SetAside(row["row"] + 1, tuple(blocking[row["row"]]), _without_number(row)) for row in rows]


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
