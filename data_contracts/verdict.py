"""What a contract found: one result per rule, and whether the rows may train."""

from dataclasses import asdict, dataclass, field
from html import escape
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
    rows: tuple[int | str, ...] = ()  # the first five: 1-based lines, as an editor shows the source, or `part-2.jsonl:17`
    example: str | None = None
    observed: object = None
    unit: str = "rows"  # what is counted
    limit: str = ""  # the setting that decides, with its value

    def finding(self) -> str:
        """Say in a few words what was found."""
        if self.status == "ERROR" or self.unexpected_count is None:
            return str(self.observed)
        share = f"{self.unexpected_count / self.total:.2%}" if self.total else "all"
        return f"{self.unexpected_count:,} of {self.total:,} {self.unit} ({share})"

    def where(self) -> str:
        """Say where the first rows stand."""
        named = ", ".join(map(str, self.rows))
        return f"lines {named}" if isinstance(self.rows[0], int) else named


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
    n_set_aside: int = 0  # rows that do not train, as the profile allows
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

    def to_html(self, source: str) -> str:
        """Return the verdict on every rule as one page that loads nothing: Great Expectations' own asks eight other hosts."""
        word = "accepted" if self.passed else "refused"
        rows = "".join(_html_row(it) for it in sorted(self.results, key=lambda it: _ORDER[it.status]))
        limits = ", ".join(f"{name} {value}" for name, value in self.limits.items())
        aside = (
            f"<p class=WARN>{self.n_set_aside:,} bad rows were set aside: quarantine.jsonl has each."
            if self.n_set_aside
            else ""
        )
        return (
            f"<!doctype html><meta charset=utf-8><title>{self.kind} contract</title><style>{STYLE}</style>"
            f"<h1>{self.kind} <small class={'PASS' if self.passed else 'FAIL'}>{word}</small></h1>"
            f"<p><code>{escape(source)}</code>, {self.n_rows:,} rows, contract {self.version}</p>{aside}"
            "<table><tr><th><th>rule<th>found<th>first lines<th>example<th>what training would have done"
            f"{rows}</table><p class=muted>limits: {escape(limits)}"
        )

    def aside(self) -> str:
        """Say how many rows were set aside, and what became of that."""
        became = "as the profile allows" if self.passed else "but the rest does not train either"
        count = "1 bad row was" if self.n_set_aside == 1 else f"{self.n_set_aside:,} bad rows were"
        return f"{count} set aside, {became}; quarantine.jsonl has each."

    def to_text(self) -> str:
        """Return the verdict for a terminal or a log: a block of lines per rule that found something."""
        word = "accepted" if self.passed else f"refused by {len(self.failures())} rule(s)"
        found = self._found()
        lines = [f"{self.kind} contract {self.version}: {word}, {self.n_rows:,} rows"]
        lines += [self.aside()] if self.n_set_aside else []
        lines += [f"Loosened by the profile: {', '.join(self.loosened)}."] if self.loosened else []
        for result in found:
            where = f", {result.where()}" if result.rows else ""
            decides = f"; {result.limit}" if result.limit and result.status != "PASS" else ""
            lines += [f"  {result.status}  {result.rule}: {result.finding()}{where}{decides}"]
            lines += [f"        e.g. {result.example}"] if result.example else []
            lines += [f"        {result.harm}"] if result.status != "PASS" else []
        return "\n".join([*lines, f"  {len(self.results) - len(found)} of {len(self.results)} rules found nothing."])

    def _found(self) -> list[RuleResult]:
        return sorted((it for it in self.results if _speaks(it)), key=lambda it: _ORDER[it.status])

    def to_markdown(self) -> str:
        """Return the verdict and a table of what was found, the blocking rules first; silent rules are only counted."""
        word = "accepted" if self.passed else f"refused by {len(self.failures())} rule(s)"
        found = self._found()
        lines = [f"### {self.kind} {self.version}: {word}, {self.n_rows:,} rows", ""]
        if self.n_set_aside:
            lines += [
                f"**{self.n_set_aside:,} bad rows were set aside**, as the profile allows: quarantine.jsonl has each.",
                "",
            ]
        if self.loosened:
            lines += [f"Loosened by the profile: {', '.join(self.loosened)}.", ""]
        if found:
            lines += [
                "| status | rule | found | first lines | example | what it would do |",
                "|---|---|---|---|---|---|",
            ]
            lines += [_table_row(result) for result in found] + [""]
        return "\n".join([*lines, f"{len(self.results) - len(found)} of {len(self.results)} rules found nothing."])


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } th { font-weight: 600 } code { background: #f3f4f8 } .muted { color: #667 }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid #dde }
.PASS { color: #186a3b } .FAIL, .ERROR { color: #b03a2e } .WARN { color: #9a6700 }
"""


def _html_row(result: RuleResult) -> str:
    found = result.finding() if _speaks(result) else ""
    harm = result.harm if result.status != "PASS" else ""
    cells = (result.rule, found, ", ".join(str(row) for row in result.rows), result.example or "", harm)
    status = f"<td class={result.status}>{result.status.lower()}"
    return f"<tr>{status}" + "".join(f"<td>{escape(cell)}" for cell in cells)


def _speaks(result: RuleResult) -> bool:
    return result.status != "PASS" or bool(result.unexpected_count)


def _table_row(result: RuleResult) -> str:
    lines = ", ".join(str(row) for row in result.rows)
    harm = result.harm if result.status != "PASS" else "within its limit"
    cells = (result.status, result.rule, result.finding(), lines, result.example or "", harm)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
