"""The report of a run: what each stage came to, the curves, the verdict, and what the models write. One file, no network."""

import html as escaping
import json
from pathlib import Path
from typing import Any

from tasks.environment import home
from tasks.ledger import UNITS
from tasks.monitoring import curves, mlflow_runs
from tasks.monitoring.metrics import CURVES, MEANING, key_metric
from tasks.pipeline_run import PipelineRun, write_json
from tasks.retrains import SIGNALS

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #dde }
th { font-weight: 600 } .ok { color: #186a3b } .bad { color: #b03a2e } .warn { color: #9a5b00 }
code { background: #f3f4f8; padding: 0 .2rem }
.lines { white-space: pre-line }
img { max-width: 100% } .charts { display: flex; flex-wrap: wrap; gap: .8rem }
figure { margin: 0; width: 17rem; max-width: 100% } figcaption { font-size: .8rem; color: #667 }
pre { white-space: pre-wrap; background: #f7f8fb; padding: .6rem } .muted { color: #667 }
"""
NUM_SAMPLES = 6
CLAIM_HEAD = ("verdict", "claim", "metric", "n", "estimate", "interval", "limit")
CLASS = {"PASS": "ok", "FAIL": "bad", "INCONCLUSIVE": "warn"}
RELEASE = ("promote", "push")
Plots = dict[str, dict[str, str]]


def html(run: PipelineRun, summary: dict[str, Any], plots: Plots, past: dict[str, str]) -> str:
    """Return the whole report as one page.

    `plots` are the stages' charts, by stage and metric, and `past` those of the profile's last runs, as base64 PNG.
    """
    state = "ok" if summary["exit_code"] == 0 else "bad"
    parts = [
        f"<h1>{_text(run.profile.name)} <small class={state}>{summary['status']}</small></h1>",
        f"<p>{_text(run.profile.description)}</p><p class=muted>run {run.run_id}</p>",
        f"<p class='bad lines'>{_text(summary['error'])}</p>" if summary["error"] else "",
        _table(("stage", "", "seconds", "key metric", "fingerprint"), [stage_cells(s) for s in summary["stages"]]),
        _notes(summary["stages"]),
        _estimates_table(summary["metrics"]),
        _gate(summary["gate"]),
        _retrain(summary["retrain"], past),
        _data(run, summary["stages"]),
        _release(summary),
        _curves(plots),
        _samples(run, summary),
        f"<h2>Export</h2><p><code>{_text(summary['serve'])}</code></p>" if summary["serve"] else "",
        _cost(run, summary["stages"], summary["cost"]),
        _versions(run, summary["stages"]),
    ]
    head = f"<meta name=viewport content='width=device-width'><title>{run.profile.name}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><meta charset=utf-8>{head}" + "\n".join(parts)


def markdown(run: PipelineRun, summary: dict[str, Any], plots: Plots) -> str:
    """Return the report's tables and curves for the run's page in Prefect."""
    head = "| stage | | seconds | key metric | fingerprint |\n|---|---|---|---|---|\n"
    lines = [f"**{run.profile.name}**: {summary['status']} (run {run.run_id})", ""]
    lines += [*(f"> {line}" for line in summary["error"].splitlines()), ""] if summary["error"] else []
    rows = [[cell.replace("|", "\\|") for cell in stage_cells(stage)] for stage in summary["stages"]]
    lines += [head + "\n".join("| " + " | ".join(row) + " |" for row in rows), ""]
    for metric, models in summary["metrics"].items():
        lines += [f"**{metric}** " + " → ".join(f"{name} {estimate_text(e)}" for name, e in models.items()), ""]
    lines += gate_lines(summary["gate"]) if summary["gate"] else []
    lines += [f"\n> {record['stage']}: {note}" for record in summary["stages"] for note in record["notes"]]
    lines += ["", f"**release** {approval_text(summary['approval'])}"] if summary["approval"] else []
    images = [
        f"\n**{stage}**\n\n" + " ".join(f"![{key}](data:image/png;base64,{png})" for key, png in charts.items())
        for stage, charts in plots.items()
    ]
    return "\n".join([*lines, *images])


def gate_lines(gate: dict[str, Any]) -> list[str]:
    """Return the verdict and its claims as Markdown."""
    rows = [[cell.replace("|", "\\|") for cell in claim_cells(claim)] for claim in gate["claims"]]
    table = ["| " + " | ".join(row) + " |" for row in [list(CLAIM_HEAD), ["---"] * len(CLAIM_HEAD), *rows]]
    return [f"**gate** {gate_text(gate)}", "", *(table if rows else []), ""]


def gate_text(gate: dict[str, Any]) -> str:
    """Return e.g. `INCONCLUSIVE, candidate number 3 on these held-out rows`."""
    return f"{gate['verdict']}, candidate number {gate['looks']} on these held-out rows"


def claim_cells(claim: dict[str, Any]) -> list[str]:
    """Return a claim's row of the gate's table, as plain text: a difference has its sign, a floor's own value has none."""
    form = "" if claim["asked"] == "floor" else "+"
    numbers = {name: "" if claim[name] is None else f"{claim[name]:{form}.3f}" for name in ("estimate", "low", "high", "limit")}
    interval = f"[{numbers['low']}, {numbers['high']}]" if numbers["low"] else ""
    n = "" if claim["n"] is None else str(claim["n"])
    return [claim["verdict"], claim["asked"], claim["metric"], n, numbers["estimate"], interval, numbers["limit"]]


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


def plots_of(stages: list[dict[str, Any]]) -> Plots:
    """Return the charts of every stage that logged curves, by stage and metric."""
    return {record["stage"]: charts for record in stages if (charts := plot(record))}


def plot(record: dict[str, Any]) -> dict[str, str]:
    """Return a stage's curves with the corridors that judged them, as base64 PNG by metric; those of a build are drawn once."""
    keys, run_id = CURVES.get(record["stage"], ()), record["mlflow_run_id"]
    if not keys or not run_id:
        return {}
    kept = home() / ".charts" / f"{run_id}.json"
    if record["status"] == "cached" and kept.is_file():
        return json.loads(kept.read_text())
    charts = draw_curves(keys, run_id)
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, charts)
    return charts


def draw_curves(keys: tuple[str, ...], run_id: str) -> dict[str, str]:
    limits = ("", "_warn_min", "_warn_max", "_halt_min", "_halt_max")
    series = mlflow_runs.histories(run_id, [*keys, *(f"drift/{key}{limit}" for key in keys for limit in limits)])
    return {key: curves.as_text(curves.draw(series, [key])) for key in keys if key in series}


def plots_of_history(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return a chart of each canary signal over a profile's runs; nothing before there are two to compare."""
    series = {
        name: [(number, row[name]) for number, row in enumerate(rows, start=1) if row[name] is not None] for name in SIGNALS
    }
    return {name: curves.as_text(curves.draw(series, [name])) for name, points in series.items() if len(points) > 1}


def _estimates_table(metrics: dict[str, Any]) -> str:
    rows = [(metric, name, estimate_text(e), str(e["n"])) for metric, models in metrics.items() for name, e in models.items()]
    return _table(("held-out metric", "model", "value [95 % interval]", "n"), rows) if rows else ""


def _gate(gate: dict[str, Any] | None) -> str:
    if gate is None:
        return ""
    head = f"<h2>Gate: <span class={CLASS[gate['verdict']]}>{_text(gate_text(gate))}</span></h2>"
    if not gate["claims"]:
        return head + "<p class=warn>Nothing was asked of the candidate.</p>"
    table = _table(CLAIM_HEAD, [claim_cells(claim) for claim in gate["claims"]])
    items = [f"<li class={CLASS[claim['verdict']]}>{_text(claim['text'])}" for claim in gate["claims"]]
    return head + table + f"<ul>{''.join(items)}</ul>"


def _notes(stages: list[dict[str, Any]]) -> str:
    """Show what was said of a stage while it was built: the governor's warnings, restarts, a rollback, failed attempts."""
    built = [record for record in stages if record["stage"] not in RELEASE]
    items = [f"<li>{record['stage']}: {_text(note)}" for record in built for note in record["notes"]]
    return f"<h2>On the way</h2><ul class=warn>{''.join(items)}</ul>" if items else ""


def _release(summary: dict[str, Any]) -> str:
    """Show which version is the champion now, who approved it, and where it was pushed."""
    lines = [approval_text(summary["approval"])] if summary["approval"] else []
    lines += [note for record in summary["stages"] if record["stage"] in RELEASE for note in record["notes"]]
    return f"<h2>Release</h2><ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>" if lines else ""


def _retrain(retrain: dict[str, Any] | None, past: dict[str, str]) -> str:
    """Show the canaries, and how far they are from those of the last accepted runs."""
    if not retrain or not retrain["canaries"]:
        return ""
    rows = [(name, f"{value:.3f}", MEANING[name]) for name, value in retrain["canaries"].items()]
    drifted = "".join(f"<li class={'bad' if d['fails'] else 'warn'}>{_text(d['text'])}" for d in retrain["drifted"])
    verdict = f"<ul>{drifted}</ul>" if drifted else "<p class=muted>No drift against the last accepted runs.</p>"
    table = _table(("at the end of training", "", ""), rows)
    return "<h2>Canaries</h2>" + table + verdict + _charts({key: (png, "by run, the newest last") for key, png in past.items()})


def _data(run: PipelineRun, stages: list[dict[str, Any]]) -> str:
    """Show each dataset: rows, rows set aside, and the tokens that its trainers read."""
    rows = []
    for record in (record for record in stages if record["stage"].startswith("validate-") and record["artifact"]):
        details = _manifest(run, record).get("artifact", {}).get("details", {})
        tokens = ", ".join(f"{stage} {judged['tokens']:,}" for stage, judged in details.get("tokens", {}).items())
        counts = [f"{record['metrics'].get(name, 0):,.0f}" for name in ("num_rows", "data/quarantined_rows")]
        rows.append([record["stage"].removeprefix("validate-"), details.get("contract", {}).get("kind", ""), *counts, tokens])
    return "<h2>Data</h2>" + _table(("dataset", "kind", "rows", "set aside", "tokens"), rows) if rows else ""


def _cost(run: PipelineRun, stages: list[dict[str, Any]], cost: dict[str, Any]) -> str:
    ran = [record for record in stages if record["status"] == "ran"]
    cached = [record for record in stages if record["status"] == "cached" and record["artifact"]]
    spared = sum(_manifest(run, record).get("artifact", {}).get("seconds", 0.0) for record in cached)
    total = sum(record["seconds"] for record in ran)
    text = f"{total:,.0f} s in {len(ran)} stages that ran; {len(cached)} came from the store, which spared {spared:,.0f} s."
    rows = [("all jobs", cost["total"]), *((f"for nothing: {cause}", wasted) for cause, wasted in cost["waste"].items())]
    cells = [[what, *(f"{used[unit]:,.0f}" for unit in UNITS)] for what, used in rows]
    table = _table(("", *(unit.replace("_", " ") for unit in UNITS)), cells) if any(cost["total"].values()) else ""
    return f"<h2>Cost</h2><p>{text}</p>{table}"


def _versions(run: PipelineRun, stages: list[dict[str, Any]]) -> str:
    """Show the libraries that the newest job ran with."""
    last = next((record for record in reversed(stages) if record["artifact"]), None)
    libraries = _manifest(run, last).get("identity", {}).get("libraries", {}) if last else {}
    return f"<p class=muted>{_text(', '.join(f'{name} {version}' for name, version in libraries.items()))}</p>"


def _manifest(run: PipelineRun, record: dict[str, Any]) -> dict[str, Any]:
    stage = "dataset" if record["stage"].startswith("validate-") else record["stage"]
    return run.store.manifest(stage, record["fingerprint"]) or {} if record["fingerprint"] else {}


def _curves(plots: Plots) -> str:
    parts = []
    for stage, charts in plots.items():
        parts.append(f"<h3>{stage}</h3>" + _charts({key: (png, MEANING[key]) for key, png in charts.items()}))
    legend = "Pale: as logged. Dark: moving average, where it is judged. Dashed: its limits, orange warns and red halts."
    return f"<h2>Curves</h2><p class=muted>{legend}</p>" + "".join(parts) if parts else ""


def _charts(charts: dict[str, tuple[str, str]]) -> str:
    figures = [
        f"<figure><img alt='{key}' src='data:image/png;base64,{png}'><figcaption>{caption}</figcaption></figure>"
        for key, (png, caption) in charts.items()
    ]
    return f"<div class=charts>{''.join(figures)}</div>" if figures else ""


def _samples(run: PipelineRun, summary: dict[str, Any]) -> str:
    """Show what each model answers to the first held-out prompts."""
    evaluated = next((s for s in summary["stages"] if s["stage"] == "evaluate" and s["artifact"]), None)
    if evaluated is None:
        return ""
    lines = [json.loads(line) for line in (Path(evaluated["artifact"]) / "samples.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["metric"] == run.profile.recipe.evaluate.metric]
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
