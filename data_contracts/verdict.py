"""What a contract found: one result per rule, and whether the rows may train."""

from dataclasses import asdict, dataclass, field
from typing import Literal

Status = Literal["PASS", "FAIL", "WARN", "ERROR"]
_ORDER = {"ERROR": 0, "FAIL": 1, "WARN": 2, "PASS": 3}


@dataclass(frozen=True)
class RuleResult:
    """How one rule went. ERROR is a rule that could not be judged; it blocks whatever its severity."""

    rule: str
    severity: Literal["critical", "warning"]
    status: Status
    harm: str
    column: str | None = None
    unexpected_count: int | None = None
    total: int | None = None
    rows: tuple[int, ...] = ()  # 1-based, as an editor shows the source; the first five
    example: str | None = None
    observed: object = None

    def finding(self) -> str:
        """Say in a few words what was found."""
        if self.status == "ERROR" or self.unexpected_count is None:
            return str(self.observed)
        share = f"{self.unexpected_count / self.total:.2%}" if self.total else "all"
        return f"{self.unexpected_count:,} of {self.total:,} rows ({share})"


@dataclass(frozen=True)
class Verdict:
    """What `contract.judge` says of one set of rows. `passed` is False on any ERROR and on any critical FAIL."""

    kind: str
    version: str
    passed: bool
    n_rows: int
    results: tuple[RuleResult, ...]
    limits: dict[str, float] = field(default_factory=dict)
    loosened: tuple[str, ...] = ()  # limits that the profile set wider than the contract ships them
    gx_result: dict = field(default_factory=dict)

    def failures(self) -> list[RuleResult]:
        """Return the results that block, ERROR first."""
        blocking = (result for result in self.results if result.status in ("ERROR", "FAIL"))
        return sorted(blocking, key=lambda result: _ORDER[result.status])

    def warnings(self) -> list[RuleResult]:
        return [result for result in self.results if result.status == "WARN"]

    def to_dict(self) -> dict:
        """Return everything but Great Expectations' own result, ready for JSON."""
        plain = asdict(self)
        del plain["gx_result"]
        return plain

    def to_markdown(self) -> str:
        """Return the verdict and a table of what was found, the blocking rules first; silent rules are only counted."""
        word = "accepted" if self.passed else f"refused by {len(self.failures())} rule(s)"
        found = sorted((it for it in self.results if _speaks(it)), key=lambda it: _ORDER[it.status])
        lines = [f"### {self.kind} {self.version}: {word}, {self.n_rows:,} rows", ""]
        if self.loosened:
            lines += [f"Loosened by the profile: {', '.join(self.loosened)}.", ""]
        if found:
            lines += [
                "| status | rule | found | first lines | example | what it would do |",
                "|---|---|---|---|---|---|",
            ]
            lines += [_table_row(result) for result in found] + [""]
        return "\n".join([*lines, f"{len(self.results) - len(found)} of {len(self.results)} rules found nothing."])


def _speaks(result: RuleResult) -> bool:
    return result.status != "PASS" or bool(result.unexpected_count)


def _table_row(result: RuleResult) -> str:
    lines = ", ".join(str(row) for row in result.rows)
    harm = result.harm if result.status != "PASS" else "within its limit"
    cells = (result.status, result.rule, result.finding(), lines, result.example or "", harm)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
