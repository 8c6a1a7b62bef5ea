"""The figures of a sweep."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline.metrics.names import axis_label, label_of
from pipeline.run_folder import TrialOutcome
from pipeline.tuning.config import Range, TuneConfig, mode_of
from pipeline.tuning.ranking import Ranking
from pipeline.tuning.space import shown

BLUE, RED, GRAY = "#30638e", "#d1495b", "#9aa3ad"


def tradeoff_figure(trials: Sequence[TrialOutcome], settings: TuneConfig, ranking: Ranking) -> Figure:
    """Every searched field against every metric: a panel for each pair.

    Trials without the metric are omitted; those that were stopped early are hollow. The best trial is a star, unless
    other trials differ from it by less than the noise.
    """
    fields = sorted({name for trial in trials for name in trial.values if name in settings.space})
    rows = len(settings.metrics)
    figure = Figure(figsize=(3.2 * max(1, len(fields)), 0.5 + 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, max(1, len(fields)), sharey="row", sharex="col", squeeze=False)
    for panels, metric in zip(grid, settings.metrics, strict=True):
        measured = [trial for trial in trials if metric in trial.metrics]
        for panel, field in zip(panels, fields, strict=False):
            _scale(panel, settings, field)
            for trial in (each for each in measured if field in each.values):
                star = trial.run_name == ranking.best and len(ranking.tied) <= 1
                color = RED if trial.run_name == ranking.best else BLUE
                panel.scatter(
                    _position(trial.values[field]), trial.metrics[metric],
                    s=90 if star else 45, marker="*" if star else "o", zorder=3 if star else 2,
                    facecolors="none" if trial.status == "stopped" else color, edgecolors=color,
                )  # fmt: skip
            panel.grid(visible=True, color="#dddddd", linewidth=0.6)
            panel.set_axisbelow(True)
        panels[0].set_ylabel(axis_label(metric))
    for panel, field in zip(grid[-1], fields, strict=False):
        panel.set_xlabel(field)
    return figure


def pareto_figure(
    trials: Sequence[TrialOutcome], settings: TuneConfig, ranking: Ranking, first_point: str
) -> Figure:
    """The first two metrics against each other: the front is connected, its trials and `first_point` are named."""
    first, second = settings.metrics[:2]
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for trial in trials:
        if first in trial.metrics and second in trial.metrics and trial.status != "failed":
            on_front = trial.run_name in ranking.front
            hollow = trial.status == "stopped"
            color = RED if on_front else GRAY
            axes.scatter(trial.metrics[first], trial.metrics[second], s=60 if on_front else 36, edgecolors=color,
                         facecolors="none" if hollow else color, zorder=3 if on_front else 2)  # fmt: skip
    front = [each for each in ranking.candidates if each.trial.run_name in ranking.front]
    points = sorted((each.means[first], each.means[second], each.trial.run_name) for each in front)
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=RED, linewidth=1, zorder=1)
    points += [
        (each.metrics[first], each.metrics[second], first_point)
        for each in trials
        if each.run_name == first_point and first_point not in ranking.front
    ]
    for number, (x, y, name) in enumerate(points):
        text = name + (" (knee)" if name == ranking.best else "")
        text += ", tune.points[0]" if name == first_point else ""
        # Towards the middle, so that no name crosses the frame.
        is_right = x > sum(axes.get_xlim()) / 2
        is_above = number % 2 == 0 or name not in ranking.front
        axes.annotate(text, (x, y), xytext=(-6 if is_right else 6, 9 if is_above else -15),
                      textcoords="offset points", ha="right" if is_right else "left", fontsize=8,
                      fontweight="bold" if name == ranking.best else "normal")  # fmt: skip
    axes.margins(0.16)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(axis_label(first))
    axes.set_ylabel(axis_label(second))
    return figure


def parallel_figure(trials: Sequence[TrialOutcome], settings: TuneConfig) -> Figure | None:
    """Parallel coordinates: a line for each finished trial over all fields and metrics, colored by the first metric."""
    metric = settings.metrics[0]
    finished = [
        each
        for each in trials
        if each.status == "finished" and math.isfinite(each.metrics.get(metric, math.nan))
    ]
    if len(finished) < 2:
        return None
    columns: list[tuple[str, list[Any]]] = [
        (name, [trial.values.get(name) for trial in finished]) for name in settings.space
    ]
    columns += [
        (name, [trial.metrics.get(name, math.nan) for trial in finished]) for name in settings.metrics
    ]
    scaled = [_scaled(name, values, settings) for name, values in columns]
    figure = Figure(figsize=(max(5.0, 1.9 * len(columns)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    values = [trial.metrics[metric] for trial in finished]
    color = Normalize(min(values), max(values))
    colors = matplotlib.colormaps["viridis" if mode_of(metric) == "max" else "viridis_r"]
    for value, line in zip(values, zip(*(places for places, _ in scaled), strict=True), strict=True):
        axes.plot(line, color=colors(color(value)), linewidth=1.6)
    for position, (_, ends) in enumerate(scaled):
        axes.axvline(position, color="#999999", linewidth=0.8, zorder=0)
        for text, y, offset in zip(ends, (0.0, 1.0), (-13, 6), strict=True):
            axes.annotate(
                text, (position, y), xytext=(0, offset), textcoords="offset points", ha="center", fontsize=8
            )
    names = [name if name in settings.space else axis_label(name) for name, _ in columns]
    axes.set_xticks(range(len(columns)), [name.replace(".", ".\n", 1) for name in names], fontsize=8)
    axes.tick_params(axis="x", pad=16, length=0)
    axes.set_yticks([])
    axes.set_ylim(-0.02, 1.02)
    axes.spines[:].set_visible(False)
    return figure


def importance_figure(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars for each metric: the share of its variance that each field explains."""
    count, fields = len(importances), len(next(iter(importances.values())))
    figure = Figure(figsize=(2.2 + 3.4 * count, 1.0 + 0.4 * fields), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel, (metric, shares) in zip(panels, importances.items(), strict=True):
        bars = panel.barh(list(shares), list(shares.values()), color=BLUE)
        panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        panel.set_xlim(0, 1.15)
        panel.set_xlabel("share of the variance")
        panel.set_title(label_of(metric), fontsize=10)
    panels[0].invert_yaxis()
    return figure


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def as_svg(figure: Figure) -> bytes:
    """The figure as an SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "esrgan-ray"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _position(value: Any) -> Any:
    """Where a value is drawn: numbers as numbers, everything else as a category."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else shown(value)


def _scale(panel: Axes, settings: TuneConfig, field: str) -> None:
    span = settings.space[field]
    if isinstance(span, Range) and span.log:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(numticks=5))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))


def _scaled(name: str, values: Sequence[Any], settings: TuneConfig) -> tuple[list[float], tuple[str, str]]:
    """Values from 0 to 1, and the text at both ends."""
    span = settings.space.get(name)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        texts = sorted({shown(value) for value in values})
        places = {text: index / max(1, len(texts) - 1) for index, text in enumerate(texts)}
        return [places[shown(value)] for value in values], (texts[0], texts[-1])
    is_log = isinstance(span, Range) and span.log
    numbers = [math.log(value) if is_log else float(value) for value in values]
    low, high = min(numbers), max(numbers)
    extent = (high - low) or 1.0
    ends = (shown(float(min(values))), shown(float(max(values))))
    return [(number - low) / extent for number in numbers], ends
