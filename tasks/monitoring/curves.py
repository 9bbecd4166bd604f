"""Pictures of series: each as it was logged, its moving average, and the limits that judged it."""

import base64
import io
from typing import Any

from tasks.monitoring.drift import Series

RAW, AVERAGE, WARN, HALT = "#9db2dd", "#2b4ea2", "#d9902f", "#b03a2e"
COLUMNS = 4


def draw(series: Series, keys: list[str]) -> bytes:
    """Return a PNG with one chart for each of `keys` that was logged; `drift/<key>` and its limits are drawn with it."""
    from matplotlib.figure import Figure  # a second of import, only where there is something to draw

    keys = [key for key in keys if series.get(key)]
    columns = max(1, min(COLUMNS, len(keys)))
    rows = max(1, -(-len(keys) // columns))
    figure = Figure(figsize=(3.1 * columns, 2.3 * rows), layout="constrained")
    charts = figure.subplots(rows, columns, squeeze=False).ravel()
    for chart, key in zip(charts, keys, strict=False):
        _chart(chart, series, key)
    for chart in charts[len(keys) :]:
        chart.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def as_text(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _chart(chart: Any, series: Series, key: str) -> None:
    average = series.get(f"drift/{key}")
    chart.plot(*zip(*series[key], strict=True), color=RAW if average else AVERAGE, linewidth=1.2)
    low, high = chart.get_ylim()
    if average:
        chart.plot(*zip(*average, strict=True), color=AVERAGE, linewidth=1.5)
    for level in ("warn_min", "warn_max", "halt_min", "halt_max"):
        limit = series.get(f"drift/{key}_{level}")
        # a limit far above everything would press the curve flat; it comes into view when the curve nears it
        if limit and low - (high - low) <= limit[-1][1] <= high + (high - low):
            chart.plot(*zip(*limit, strict=True), color=HALT if level.startswith("halt") else WARN, linewidth=1, linestyle="--")
    chart.set_title(key, fontsize=8.5)
    chart.tick_params(labelsize=7)
    chart.grid(alpha=0.25)
    chart.spines[["top", "right"]].set_visible(False)
