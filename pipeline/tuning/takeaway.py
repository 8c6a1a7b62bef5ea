"""What a sweep leaves after best.yaml: figures, the report and the study's database."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import optuna
import torch

from pipeline.imaging import Image
from pipeline.model import RRDBNet
from pipeline.run_folder import TrialOutcome
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.state import build_generator
from pipeline.training.validation import detailed_crops
from pipeline.training.validation_sets import find_sets, open_sets
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.figure import (
    as_png,
    as_svg,
    importance_figure,
    parallel_figure,
    pareto_figure,
    tradeoff_figure,
)
from pipeline.tuning.proposals import study
from pipeline.tuning.ranking import Ranking
from pipeline.tuning.report import render_report
from pipeline.tuning.space import points
from pipeline.tuning.trial_queue import TrialQueue

SHOWN_TRIALS = 4
SHOWN_IMAGES = 4
# With fewer trials, the importances would be chance.
MIN_IMPORTANCE_TRIALS = 8


def sweep_files(queue: TrialQueue, ranking: Ranking, trials: Sequence[TrialOutcome]) -> dict[str, bytes]:
    """The files that a sweep ends with, by name; `trials` are in the ranking's order."""
    settings = queue.settings
    drawn, first_point = _means(trials, ranking), _first_point(queue)
    tradeoff = tradeoff_figure(drawn, settings, ranking)
    figures = []
    if len(settings.metrics) > 1:
        text = "Red: the Pareto front; no other trial is better in every metric. Gray: the other trials."
        figures.append(("Pareto front", text, as_svg(pareto_figure(drawn, settings, ranking, first_point))))
    best = "the best trial" if len(settings.metrics) == 1 else "the knee of the Pareto front"
    text = f"A star: {best}; hollow: stopped early, before its last step."
    figures.append(("Fields and metrics", text, as_svg(tradeoff)))
    if parallel := parallel_figure(drawn, settings):
        text = "A line is a finished trial; yellow: the best values of the first metric. Numbers: the ends of an axis."
        figures.append(("Parallel coordinates", text, as_svg(parallel)))
    if shares := importances(settings, queue):
        text = "Share of the variance between the trials that a field explains (Optuna's fANOVA)."
        figures.append(("Importance of the fields", text, as_svg(importance_figure(shares))))
    return {
        "tradeoff.png": as_png(tradeoff),
        "report.html": render_report(settings, trials, ranking, figures, crops(queue, ranking), first_point),
        "study.db": queue.database(),
    }


def _means(trials: Sequence[TrialOutcome], ranking: Ranking) -> list[TrialOutcome]:
    """The trials without repetitions; a trial that was repeated has the mean over its seeds."""
    means = {each.trial.run_name: each.means for each in ranking.candidates}
    return [
        replace(trial, metrics=trial.metrics | means.get(trial.run_name, {}))
        for trial in trials
        if not trial.repeats
    ]


def importances(settings: TuneConfig, queue: TrialQueue) -> dict[str, dict[str, float]]:
    """Share of every metric's variance that each field explains; empty with too few trials, or without variance."""
    searched = [plan for plan in queue.plans.values() if not plan.repeats]
    built = study(settings, searched, queue.outcomes, {})
    complete = built.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < MIN_IMPORTANCE_TRIALS:
        return {}
    shares = {}
    for index, metric in enumerate(settings.metrics):
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        try:
            found = optuna.importance.get_param_importances(built, evaluator=evaluator, target=_value(index))
        except RuntimeError:  # the values are (almost) equal: without variance
            continue
        shares[metric] = {name: float(found.get(name, 0.0)) for name in settings.space}
    return shares


def _value(index: int) -> Callable[[optuna.trial.FrozenTrial], float]:
    return lambda trial: float(trial.values[index])


def crops(queue: TrialQueue, ranking: Ranking) -> dict[str, dict[str, Image]]:
    """The crop with the most detail of the first validation images, by name and by what upscaled it."""
    loaded = {label: _generator(queue, trial) for label, trial in _shown_trials(queue, ranking).items()}
    generators = {label: generator for label, generator in loaded.items() if generator is not None}
    if not generators:
        return {}
    labels = ("input", "bicubic", *generators, "original")
    # The held-out images, or those of the first of validation.sets.
    sets = open_sets(queue.base, ()) or open_sets(queue.base, find_sets(queue.base))
    shown = {}
    for image in sets[0].images[:SHOWN_IMAGES]:
        crops = detailed_crops(image, [*generators.values()], queue.base.data.scale, torch.device("cpu"))
        shown[image.name] = dict(zip(labels, crops, strict=True))
    return shown


def _shown_trials(queue: TrialQueue, ranking: Ranking) -> dict[str, TrialOutcome]:
    """The trials to be shown, by label: the best ones and the first of tune.points."""
    labels = {name: name for name in ranking.names()[:SHOWN_TRIALS]}
    if first_point := _first_point(queue):
        labels[first_point] = f"{first_point}, tune.points[0]"
    if ranking.best:
        labels[ranking.best] += " (knee)" if len(queue.settings.metrics) > 1 else " (best)"
    return {label: queue.outcomes[name] for name, label in labels.items()}


def _first_point(queue: TrialQueue) -> str:
    """Run name of the finished trial of the first of tune.points; empty without one."""
    first: Sequence[Mapping[str, object]] = points(queue.settings, queue.base)[:1]
    finished = [trial for trial in queue.outcomes.values() if trial.status == "finished"]
    return next((trial.run_name for trial in finished if trial.values in first), "")


def _generator(queue: TrialQueue, trial: TrialOutcome) -> RRDBNet | None:
    """The EMA weights that a trial's value was measured on; None if the checkpoint is gone."""
    config = queue.job(trial.run_name).config
    run = Storage(config.storage) / trial.run_name
    names = [name for name in checkpoints.listed(run) if name.step == trial.step]
    try:
        weights = checkpoints.read(run, names[0]).ema
    except (IndexError, checkpoints.CorruptCheckpoint):
        return None
    generator = build_generator(config)
    generator.load_state_dict(weights)
    return generator.eval()
