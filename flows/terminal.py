"""What the terminal shows: one line per event while a run goes, and readable tables at its end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from tasks.errors import DriftHalted, PipelineError
from tasks.ledger import total

console = Console(stderr=True)
GATE_COLOUR = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}
STATUS_COLOUR = {"ran": "green", "cached": "cyan", "failed": "red", "skipped": "dim", "run": "yellow"}


class _Lines(logging.Handler):
    """Prints the pipeline's own events; a step's progress only replaces the spinner's text on a terminal."""

    def __init__(self, status: Status | None):
        super().__init__(logging.DEBUG)
        self.status = status

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "posttrain":
            return
        text = escape(record.getMessage())
        if record.levelno <= logging.DEBUG:
            if self.status:
                self.status.update(text)
            return
        colour = "yellow" if record.levelno >= logging.WARNING else "default"
        console.print(f"[{colour}]{text}[/]", highlight=False, soft_wrap=True)


@contextmanager
def attached() -> Iterator[None]:
    """Show the pipeline's events on the terminal inside the block; plain lines where it is none."""
    logger = logging.getLogger("posttrain")
    logger.setLevel(logging.DEBUG)
    status = console.status("starting the Prefect server") if console.is_terminal else None
    handler = _Lines(status)
    logger.addHandler(handler)
    try:
        if status:
            with status:
                yield
        else:
            yield
    finally:
        logger.removeHandler(handler)


def show_summary(summary: dict[str, Any]) -> None:
    """Print what became of each stage, the accuracies with their intervals, the verdict, and where everything is."""
    from flows.report import RELEASE, approval_text, estimate_text, stage_cells

    table = Table(title=f"{summary['profile']}  {summary['status']}", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "", "seconds", "key metric", "fingerprint"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    for record in summary["stages"]:
        cells = [escape(cell) for cell in stage_cells(record)]
        cells[1] = f"[{STATUS_COLOUR[record['status']]}]{cells[1]}[/]"
        table.add_row(*cells)
    console.print()
    console.print(table)
    for record in summary["stages"]:
        for note in record["notes"]:
            style = None if record["stage"] in RELEASE else "yellow"  # where it was released is no warning
            console.print(f"{record['stage']}: {escape(note)}", style=style, highlight=False, soft_wrap=True)
    for metric, models in summary["metrics"].items():
        console.print(f"\n{metric} on held-out rows, 95 % intervals")
        console.print(
            "  " + "  →  ".join(f"{name} [bold]{escape(estimate_text(e))}[/]" for name, e in models.items()), highlight=False
        )
    if summary["gate"]:
        _show_gate(summary["gate"])
    if summary["approval"]:
        console.print(f"release {escape(approval_text(summary['approval']))}", highlight=False, soft_wrap=True)
    if any(summary["cost"]["total"].values()):
        wasted = "".join(f"; for nothing, {cause}: {cost_text(cost)}" for cause, cost in summary["cost"]["waste"].items())
        console.print(f"\ncost of the jobs: {cost_text(summary['cost']['total'])}{wasted}", highlight=False)
    console.print()
    if summary["serve"] and summary["exit_code"] == 0:
        _place("serve", f"posttrain serve {summary['run_id']}")
        _place("", f"or plain {summary['serve']}")
    _place("report", summary["report"])
    _place("pages", "posttrain ui   (Prefect and MLflow on this store)")


def _show_gate(gate: dict[str, Any]) -> None:
    from flows.report import CLAIM_HEAD, claim_cells, gate_text

    console.print(f"\ngate [{GATE_COLOUR[gate['verdict']]}]{gate_text(gate)}[/]", highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in CLAIM_HEAD:
        table.add_column(column, overflow="fold")
    for claim in gate["claims"]:
        cells = [escape(cell) for cell in claim_cells(claim)]
        table.add_row(f"[{GATE_COLOUR[cells[0]]}]{cells[0]}[/]", *cells[1:])
    if gate["claims"]:
        console.print(table)


def show_plan(rows: list[dict[str, Any]]) -> None:
    """Print for each stage whether it would run, and why."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "", "about", "why"):
        table.add_column(column, overflow="fold", justify="right" if column == "about" else "left")
    for row in rows:
        status = f"[{STATUS_COLOUR[row['status']]}]{row['status']}[/]"
        table.add_row(row["stage"], status, cost_text(row["cost"], short=True), escape("\n".join(row["why"])))
    Console().print(table)
    if known := [row["cost"] for row in rows if row["cost"]]:
        console.print(f"to run: about {cost_text(total(known))}, by the median of the last builds", highlight=False)


def show_comparison(found: Any) -> None:
    """Print the fields in which two builds differ, and by how much their metrics do."""
    out = Console()
    for run_id, record in (found.earlier, found.later):
        out.print(f"{run_id}  {record.stage}/{record.fingerprint}  {record.status}", highlight=False)
    out.print("\n".join(map(escape, found.fields)) or "made of the same: one artifact, and one set of numbers", highlight=False)
    changed = {name: pair for name, pair in found.metrics.items() if pair[0] != pair[1]}
    if changed:
        table = Table(box=None, pad_edge=False)
        for column in ("metric", "before", "after"):
            table.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
        for name, (before, after) in sorted(changed.items()):
            table.add_row(escape(name), f"{before:.4g}", f"{after:.4g}")
        out.print(table)


def show_lineage(node: Any) -> None:
    """Print the tree behind an artifact, each thing's facts under its name; what several stages read is spelled out once."""
    from rich.tree import Tree

    told: set[str] = set()

    def branch(tree: Tree, node: Any) -> None:
        state = "" if node.state == "whole" else f"  [red]{escape(node.state)}[/]"
        again = node.what in told
        head = tree.add(f"{escape(node.role)} [bold]{escape(node.what)}[/]{state}{'  (above)' if again else ''}".strip())
        if again:
            return
        told.add(node.what)
        facts = {name: str(value)[:40] for name, value in node.facts.items() if name not in ("libraries", "path")}
        if facts:
            head.add("  ".join(f"[dim]{name}[/] {escape(value)}" for name, value in facts.items()), highlight=False)
        for child in node.made_of:
            branch(head, child)

    out = Tree("", hide_root=True)
    branch(out, node)
    Console().print(out)
    if libraries := node.facts.get("libraries"):
        console.print("libraries  " + "  ".join(f"{name} {version}" for name, version in libraries.items()), highlight=False)


def show_freed(found: list[Any], is_done: bool) -> None:
    """Print what is freed, or would be, the largest first."""
    table = Table(box=None, pad_edge=False)
    for column in ("MB", "path", "why"):
        table.add_column(column, justify="right" if column == "MB" else "left", overflow="fold")
    for item in sorted(found, key=lambda item: -item.size):
        table.add_row(f"{item.size / 1e6:,.1f}", escape(str(item.path)), item.why)
    if found:
        Console().print(table)
    size = sum(item.size for item in found) / 1e6
    did = "freed" if is_done else "would be freed; nothing was removed yet: --delete does it"
    console.print(f"{size:,.1f} MB in {len(found)} places {did}" if found else "nothing to free", highlight=False)


def cost_text(cost: dict[str, float] | None, short: bool = False) -> str:
    """Return a cost as a person reads it: wall time, and that of CPU and GPU."""
    if not cost:
        return ""
    wall = duration(cost["wall_seconds"])
    if short:
        return wall
    gpu = f", {duration(cost['gpu_seconds'])} of GPU" if cost["gpu_seconds"] else ""
    return f"{wall} ({duration(cost['cpu_seconds'])} of CPU{gpu})"


def duration(seconds: float) -> str:
    """Return seconds below two minutes, minutes below two hours, else hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def show_history(profile: str, rows: list[dict[str, Any]]) -> None:
    """Print a line per run, the oldest first, under a sparkline of each signal."""
    from flows.drift_history import sparkline

    if not rows:
        console.print(f"no run of {escape(profile)} is in MLflow here")
        return
    signals = [name for name in rows[0] if name.startswith("canary/") and any(row[name] is not None for row in rows)]
    table = Table(box=None, pad_edge=False)
    for column in ("run", "when (UTC)", "verdict", "policy", *(name.removeprefix("canary/") for name in signals)):
        table.add_column(column, overflow="fold", justify="right" if len(table.columns) > 3 else "left")
    table.add_row("", "", "", "", *(sparkline([row[name] for row in rows]) for name in signals))
    for row in rows:
        values = ["" if row[name] is None else f"{row[name]:.3f}" for name in signals]
        table.add_row(*(escape(row[key]) for key in ("run", "when", "verdict", "policy")), *values)
    Console().print(table)


def show_releases(profile: str, rows: list[dict[str, Any]]) -> None:
    """Print a line per alias."""
    table = Table(box=None, pad_edge=False, title=profile, title_justify="left")
    for column in ("", "version", "export", "run", "made (UTC)", "notes"):
        table.add_column(column, overflow="fold", justify="right" if column == "version" else "left")
    for row in rows:
        made = f"{datetime.fromtimestamp(row['created'], UTC):%Y-%m-%d %H:%M}"
        cells = (row["alias"], str(row["version"]), row["export"], row["run"], made, "; ".join(row["notes"]))
        table.add_row(*map(escape, cells))
    Console().print(table)


def show_findings(findings: list[Any]) -> int:
    """Print what the detectors found and return the exit code: 5 if a run with these series would have been halted."""
    out = Console()
    for finding in findings:
        colour = "red" if finding.severity == "halt" else "yellow"
        out.print(f"[{colour}]{finding.severity}[/] {escape(str(finding))}", highlight=False, soft_wrap=True)
    if not findings:
        out.print("[green]inside[/] every corridor")
    return DriftHalted.exit_code if any(finding.severity == "halt" for finding in findings) else 0


def show_verdicts(verdicts: list[tuple[str, Path, Any]]) -> None:
    """Print each contract's verdict, and where its report is."""
    for name, findings, verdict in verdicts:
        console.print(f"[bold]{escape(name)}[/]\n{escape(verdict.to_text())}", highlight=False, soft_wrap=True)
        _place("report", f"{findings}/contract.html")


def show_checks(checks: list[Any]) -> int:
    """Print one line per check and return the exit code: 0 if each is ok."""
    out = Console()
    for check in checks:
        mark = "[green]ok  [/]" if check.ok else "[red]todo[/]"
        out.print(f"{mark} {escape(check.what)}" + ("" if check.ok else f"\n     → {escape(check.remedy)}"), highlight=False)
    return 0 if all(check.ok for check in checks) else 1


def show_error(error: PipelineError) -> None:
    """Print a deliberate stop's text."""
    console.print(f"[red]{type(error).__name__}[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _place(what: str, where: str) -> None:
    console.print(f"  {what:<7} {escape(where)}", highlight=False, soft_wrap=True)
