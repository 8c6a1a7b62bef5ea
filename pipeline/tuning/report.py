"""The report of a sweep: one HTML page that needs no network."""

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import jinja2

from pipeline.imaging import Image
from pipeline.imaging.arrays import encoded
from pipeline.metrics.names import METRICS, label_of, metric_of
from pipeline.run_folder import TrialOutcome
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ranking import Ranking
from pipeline.tuning.space import shown

MAX_NAMES = 4


def render_report(
    settings: TuneConfig,
    trials: Sequence[TrialOutcome],
    ranking: Ranking,
    figures: Sequence[tuple[str, str, bytes]],
    crops: Mapping[str, Mapping[str, Image]],
    first_point: str = "",
) -> bytes:
    """The page.

    Args:
        trials: all ended trials, in the ranking's order.
        figures: title, explanation and SVG of each figure.
        crops: a crop of every shown validation image, by what upscaled it.
        first_point: run name of the trial of the first of tune.points.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.tuning", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    fields = list(settings.space)
    rows = []
    for trial in trials:
        candidate = ranking.of(trial.run_name)
        repeated = candidate if candidate and candidate.repetitions else None
        rows.append(
            {
                "trial": trial,
                "marks": marks(trial, settings, ranking, first_point),
                "fields": [shown(trial.values.get(name)) for name in fields],
                "metrics": [_metric(trial, name) for name in settings.metrics],
                "means": [
                    f"{_text(name, repeated.means[name])} over {repeated.count} seeds"
                    for name in settings.metrics
                ]
                if repeated
                else [],
            }
        )
    return environment.get_template("report.html.j2").render(
        name=settings.name,
        fields=fields,
        metrics=[label_of(name) for name in settings.metrics],
        rows=rows,
        summary=summary(settings, trials, ranking),
        best=ranking.best,
        figures=[(title, text, _data_uri(content, "svg+xml")) for title, text, content in figures],
        crops=[(name, [(each, _webp(pixels)) for each, pixels in crop.items()]) for name, crop in crops.items()],
        settings=json.dumps(settings.model_dump(mode="json"), indent=1),
    ).encode()  # fmt: skip


def summary(settings: TuneConfig, trials: Sequence[TrialOutcome], ranking: Ranking) -> list[str]:
    """What was found, in plain sentences."""
    counts = Counter(trial.status for trial in trials)
    listed = ", ".join(f"{counts[each]} {each}" for each in ("finished", "stopped", "failed") if counts[each])
    lines = [f"{len(trials)} trials: {listed}."]
    best = ranking.of(ranking.best)
    if best is None:
        return [*lines, "No trial can be called the best: none has finished and meets the constraints."]
    values = ", ".join(f"{name} = {shown(value)}" for name, value in best.trial.values.items())
    measured = ", ".join(f"{label_of(name)} {_text(name, best.means[name])}" for name in settings.metrics)
    if len(settings.metrics) > 1:
        lines.append(
            f"{len(ranking.front)} trials are on the Pareto front: no other trial is better in every metric. The knee, "
            f"{ranking.best}, is the closest to the best value of each metric: {measured}, with {values}."
        )
    else:
        lines.append(f"The best trial is {ranking.best}: {measured}, with {values}.")
    others = [name for name in ranking.tied if name != ranking.best]
    if not ranking.noise:
        lines.append(
            "The noise between seeds was not measured (tune.repeats): small differences may be chance."
        )
    else:
        noise = ", ".join(f"{label_of(name)} {value:.4f}" for name, value in ranking.noise.items())
        equal = ", ".join(others[:MAX_NAMES])
        if len(others) > MAX_NAMES:
            equal += f" and {len(others) - MAX_NAMES} more"
        tied = f"so {equal} may be equally good" if others else "less than its lead"
        lines.append(f"The standard deviation between seeds is {noise}: {tied}.")
    return lines


def marks(trial: TrialOutcome, settings: TuneConfig, ranking: Ranking, first_point: str) -> list[str]:
    """What a trial is: best (without a tie) or tied, or knee and front; the first point; excluded by a constraint."""
    name, one = trial.run_name, len(settings.metrics) == 1
    is_excluded = trial.status == "finished" and not trial.repeats and ranking.of(name) is None
    applies = {
        "best": one and name == ranking.best and len(ranking.tied) <= 1,
        "tied": one and name in ranking.tied and len(ranking.tied) > 1,
        "knee": not one and name == ranking.best,
        "front": not one and name in ranking.front,
        "tune.points[0]": name == first_point,
        "constraint not met": bool(settings.constraints) and is_excluded,
    }
    return [mark for mark, does in applies.items() if does]


def _text(metric: str, value: float) -> str:
    known = METRICS[metric_of(metric)]
    # One digit more than elsewhere: trials are close to each other.
    return f"{value:.{known.decimals + 1}f}{' ' + known.unit if known.unit else ''}"


def _metric(trial: TrialOutcome, name: str) -> str:
    return _text(name, trial.metrics[name]) if name in trial.metrics else "–"


def _webp(pixels: Image) -> str:
    return _data_uri(encoded(pixels, "WEBP", lossless=True), "webp")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
