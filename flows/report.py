"""The report of a run: what each stage came to, the curves, the verdict, and what the models write. One file, no network."""

import base64
import html as escaping
import io
import json
from pathlib import Path
from typing import Any

from tasks.monitoring import mlflow_runs
from tasks.monitoring.metrics import CURVES, MEANING, key_metric
from tasks.pipeline_run import PipelineRun

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #dde }
th { font-weight: 600 } .ok { color: #186a3b } .bad { color: #b03a2e } code { background: #f3f4f8; padding: 0 .2rem }
img { max-width: 100% } pre { white-space: pre-wrap; background: #f7f8fb; padding: .6rem } .muted { color: #667 }
"""
NUM_SAMPLES = 6


def html(run: PipelineRun, summary: dict[str, Any], plots: dict[str, str]) -> str:
    """Return the whole report as one page; `plots` are the stages' curves as base64 PNG."""
    state = "ok" if summary["exit_code"] == 0 else "bad"
    parts = [
        f"<h1>{_text(run.profile.name)} <small class={state}>{summary['status']}</small></h1>",
        f"<p>{_text(run.profile.description)}</p><p class=muted>run {run.run_id}</p>",
        f"<p class=bad>{_text(summary['error'])}</p>" if summary["error"] else "",
        _table(("stage", "", "seconds", "key metric", "fingerprint"), [stage_cells(s) for s in summary["stages"]]),
        _estimates_table(summary["metrics"]),
        _gate(summary["gate"]),
        f"<p>Release {_text(approval_text(summary['approval']))}</p>" if summary["approval"] else "",
        _curves(plots),
        _samples(summary),
        f"<h2>Export</h2><p><code>{_text(summary['serve'])}</code></p>" if summary["serve"] else "",
    ]
    return f"<!doctype html><meta charset=utf-8><title>{run.profile.name}</title><style>{STYLE}</style>" + "\n".join(parts)


def markdown(run: PipelineRun, summary: dict[str, Any], plots: dict[str, str]) -> str:
    """Return the report's tables and curves for the run's page in Prefect."""
    head = "| stage | | seconds | key metric | fingerprint |\n|---|---|---|---|---|\n"
    lines = [f"**{run.profile.name}**: {summary['status']} (run {run.run_id})", ""]
    lines += [*(f"> {line}" for line in summary["error"].splitlines()), ""] if summary["error"] else []
    rows = [[cell.replace("|", "\\|") for cell in stage_cells(stage)] for stage in summary["stages"]]
    lines += [head + "\n".join("| " + " | ".join(row) + " |" for row in rows), ""]
    for metric, models in summary["metrics"].items():
        lines += [f"**{metric}** " + " → ".join(f"{name} {estimate_text(e)}" for name, e in models.items()), ""]
    if summary["gate"]:
        lines += ["**gate** " + ("passed" if summary["gate"]["passed"] else "failed: " + "; ".join(summary["gate"]["reasons"]))]
    lines += ["", f"**release** {approval_text(summary['approval'])}"] if summary["approval"] else []
    images = [f"\n**{stage}**\n\n![{stage}](data:image/png;base64,{png})" for stage, png in plots.items()]
    return "\n".join([*lines, *images])


def stage_cells(record: dict[str, Any]) -> list[str]:
    """Return a stage's row of the summary table, as plain text."""
    value = key_metric(record["stage"], record["metrics"]) or record["reason"] or ""
    seconds = f"{record['seconds']:.0f}" if record["status"] == "ran" else ""
    return [
        record["stage"],
        record["status"],
        seconds,
        value.splitlines()[0][:80] if value else "",
        record["fingerprint"] or "",
    ]


def estimate_text(estimate: dict[str, Any]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def approval_text(approval: dict[str, Any]) -> str:
    """Return what a person decided about the release, e.g. `approved by Ada on 2026-11-22 18:00 UTC (run …): looks right`."""
    verb = {"approve": "approved", "refuse": "refused"}[approval["decision"]]
    return f"{verb} by {approval['reviewer']} on {approval['at']} (run {approval['run_id']}): {approval['reason']}"


def plots_of(stages: list[dict[str, Any]]) -> dict[str, str]:
    """Return the curves of every stage that logged any, by stage."""
    return {record["stage"]: png for record in stages if (png := plot(record))}


def plot(record: dict[str, Any]) -> str | None:
    """Return a stage's curves as a base64 PNG, or None if it logged none."""
    keys = CURVES.get(record["stage"], ())
    run_id = record["mlflow_run_id"]
    series = {key: points for key in keys if run_id and (points := mlflow_runs.history(run_id, key))}
    if not series:
        return None
    from matplotlib.figure import Figure  # a second of import, only where there is something to draw

    figure = Figure(figsize=(3.1 * len(series), 2.4), layout="constrained")
    for axis, (key, points) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True):
        axis.plot(*zip(*points, strict=True), color="#3557a6", linewidth=1.3)
        axis.set_title(key, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return base64.b64encode(buffer.getvalue()).decode()


def _estimates_table(metrics: dict[str, Any]) -> str:
    rows = [(metric, name, estimate_text(e), str(e["n"])) for metric, models in metrics.items() for name, e in models.items()]
    return _table(("held-out metric", "model", "value [95 % interval]", "n"), rows) if rows else ""


def _gate(gate: dict[str, Any] | None) -> str:
    if gate is None:
        return ""
    verdict = "<span class=ok>passed</span>" if gate["passed"] else "<span class=bad>failed</span>"
    return f"<h2>Gate: {verdict}</h2><ul>" + "".join(f"<li>{_text(reason)}" for reason in gate["reasons"]) + "</ul>"


def _curves(plots: dict[str, str]) -> str:
    parts = []
    for stage, png in plots.items():
        legend = " · ".join(f"<code>{key}</code> {MEANING[key]}" for key in CURVES[stage])
        picture = f"<img alt='curves of {stage}' src='data:image/png;base64,{png}'>"
        parts.append(f"<h3>{stage}</h3>{picture}<p class=muted>{legend}</p>")
    return "<h2>Curves</h2>" + "".join(parts) if parts else ""


def _samples(summary: dict[str, Any]) -> str:
    """Show what base, SFT and policy answer to the first held-out prompts."""
    evaluated = next((s for s in summary["stages"] if s["stage"] == "evaluate" and s["artifact"]), None)
    if evaluated is None:
        return ""
    lines = [json.loads(line) for line in (Path(evaluated["artifact"]) / "samples.jsonl").read_text().splitlines()]
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["row"] < NUM_SAMPLES and "completion" in line:
            rows.setdefault(line["row"], {"prompt": line["prompt"], "answer": line["answer"]})[line["model"]] = line[
                "completion"
            ]
    models = list(dict.fromkeys(line["model"] for line in lines))
    cells = [[_prompt(row["prompt"]), row["answer"], *(row[model] for model in models)] for row in rows.values()]
    return "<h2>What the models answer</h2>" + _table(("prompt", "right answer", *models), cells) if cells else ""


def _prompt(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _table(head: tuple[str, ...], rows: list) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}" for cell in row) for row in rows)
    return "<table><tr>" + "".join(f"<th>{_text(name)}" for name in head) + body + "</table>"


def _text(value: Any) -> str:
    return escaping.escape(str(value))
