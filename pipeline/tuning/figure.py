"""The figure of a sweep: every searched field against the metric."""

import io
from collections.abc import Sequence

from pipeline.run_folder import TrialOutcome


def tradeoff_figure(trials: Sequence[TrialOutcome], metric: str, best: TrialOutcome) -> bytes:
    """A PNG with one panel for each searched field.

    Args:
        trials: the ended trials; those without the metric are omitted. Trials that were stopped early are hollow.
        metric: the vertical axis.
        best: the best trial, marked with a star.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [trial for trial in trials if metric in trial.metrics]
    fields = sorted({name for trial in shown for name in trial.values})
    figure = Figure(figsize=(3.2 * max(1, len(fields)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(fields)), sharey=True, squeeze=False)[0]
    for panel, field in zip(panels, fields, strict=False):
        numbers = [trial.values[field] for trial in shown]
        if all(isinstance(number, int | float) and number > 0 for number in numbers):
            low, high = min(numbers), max(numbers)
            panel.set_xscale("log" if high > 10 * low else "linear")
            if high > 10 * low:
                panel.xaxis.set_major_locator(LogLocator(numticks=5))
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        for trial in shown:
            is_best = trial.run_name == best.run_name
            color = "#d1495b" if is_best else "#30638e"
            panel.scatter(
                trial.values[field], trial.metrics[metric],
                s=90 if is_best else 45, marker="*" if is_best else "o", zorder=3 if is_best else 2,
                facecolors="none" if trial.status == "stopped" else color, edgecolors=color,
            )  # fmt: skip
        panel.set_xlabel(field)
        panel.grid(visible=True, color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].set_ylabel(f"{metric} (last validation)")
    figure.suptitle(f"{len(shown)} trials; star: the best, {best.run_name}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
