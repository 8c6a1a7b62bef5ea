"""Compares the trials of a sweep: the best trial, the Pareto front and its knee point, and the noise between seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from pipeline.metrics.names import METRICS, metric_of
from pipeline.run_folder import TrialOutcome
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.constraint import Constraint

# A difference of two means is larger than the noise if it exceeds this many of its standard errors.
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Candidate:
    """A trial together with its repetitions."""

    trial: TrialOutcome
    repetitions: tuple[TrialOutcome, ...]
    """The finished ones, with other seeds."""
    means: dict[str, float]
    """Mean of every objective over the trial and its repetitions, without the effect of the seeds on all trials."""

    @property
    def count(self) -> int:
        """Number of seeds."""
        return 1 + len(self.repetitions)


@dataclass(frozen=True)
class Ranking:
    """The compared trials."""

    candidates: tuple[Candidate, ...] = ()
    """Finished trials that meet the constraints, from the best by the first metric."""
    front: tuple[str, ...] = ()
    """Run names on the Pareto front, by the first metric."""
    best: str = ""
    """Run name of the best trial; with several metrics: the knee point. Empty without candidates."""
    noise: dict[str, float] = field(default_factory=dict)
    """Standard deviation between seeds of every metric; empty without repetitions."""
    tied: tuple[str, ...] = ()
    """Run names of the trials whose difference from the best is within the noise, the best included."""

    def of(self, name: str) -> Candidate | None:
        """The candidate of a trial."""
        return next((each for each in self.candidates if each.trial.run_name == name), None)

    def names(self) -> list[str]:
        """Run names of the candidates: the best, the other ones of the front, the rest."""
        rest = (each.trial.run_name for each in self.candidates)
        return list(dict.fromkeys([self.best, *self.front, *rest])) if self.candidates else []

    def repeated_means(self) -> dict[str, dict[str, float]]:
        """Means of the repeated trials, by run name."""
        return {each.trial.run_name: each.means for each in self.candidates if each.repetitions}


def in_order(trials: Sequence[TrialOutcome], ranking: Ranking) -> list[TrialOutcome]:
    """The trials from the best: candidates, each followed by its repetitions, then the other ones by their status."""
    position = {each.trial.run_name: number for number, each in enumerate(ranking.candidates)}

    def key(trial: TrialOutcome) -> tuple[int, int, int]:
        other = len(position) + ("finished", "stopped", "failed").index(trial.status)
        return position.get(trial.repeats or trial.run_name, other), bool(trial.repeats), trial.number

    return sorted(trials, key=key)


def compare_trials(settings: TuneConfig, trials: Sequence[TrialOutcome]) -> Ranking:
    """Compares the finished trials. Trials that were stopped early or failed take no part.

    A constraint is checked on the mean of what was measured with a trial's seeds, without a correction.
    """
    metrics = settings.metrics
    constraints = [Constraint.parse(text) for text in settings.constraints]
    needed = {*metrics, *(each.metric for each in constraints)}
    finished = [
        trial
        for trial in trials
        if trial.status == "finished"
        and all(math.isfinite(trial.metrics.get(name, math.nan)) for name in needed)
    ]
    groups = {
        trial.run_name: [trial, *(each for each in finished if each.repeats == trial.run_name)]
        for trial in finished
        if not trial.repeats
    }
    repeated = [group for group in groups.values() if len(group) > 1]
    # With one repeated trial, the effect of a seed on all trials cannot be separated from that on this trial.
    effects = {name: _seed_effects(repeated, name) if len(repeated) > 1 else {} for name in needed}
    candidates = []
    for trial, *repetitions in groups.values():
        means = {
            name: fmean(
                [each.metrics[name] - effects[name].get(_seed(each), 0.0) for each in (trial, *repetitions)]
            )
            for name in needed
        }
        measured = {name: fmean([each.metrics[name] for each in (trial, *repetitions)]) for name in needed}
        if all(constraint.violation(measured) <= 0 for constraint in constraints):
            candidates.append(Candidate(trial, tuple(repetitions), means))
    if not candidates:
        return Ranking()
    # Equal values: the earlier trial first.
    candidates.sort(key=lambda each: (_cost(each.means, metrics[0]), each.trial.number))
    noise = {name: _noise(repeated, name, effects[name]) for name in metrics} if repeated else {}
    front = [each for each in candidates if not any(_dominates(other, each, metrics) for other in candidates)]
    best = knee(front, metrics) if len(metrics) > 1 else candidates[0]
    return Ranking(
        tuple(candidates),
        tuple(each.trial.run_name for each in front),
        best.trial.run_name,
        noise,
        tuple(each.trial.run_name for each in candidates if _within_noise(best, each, noise))
        if noise
        else (),
    )


def knee(front: Sequence[Candidate], metrics: Sequence[str]) -> Candidate:
    """The point of the front that is closest to the best value of every metric, each scaled to the front's extent."""
    costs = np.array([[_cost(each.means, name) for name in metrics] for each in front])
    extent = np.ptp(costs, axis=0)
    scaled = (costs - costs.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    return front[int(np.linalg.norm(scaled, axis=1).argmin())]


def _cost(means: dict[str, float], metric: str) -> float:
    """A metric as a number that is better when it is smaller."""
    return METRICS[metric_of(metric)].cost(means[metric])


def _dominates(one: Candidate, other: Candidate, metrics: Sequence[str]) -> bool:
    pairs = [(_cost(one.means, name), _cost(other.means, name)) for name in metrics]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _seed(trial: TrialOutcome) -> Any:
    """The seed of a repetition; None: that of the sweep."""
    return trial.values.get("seed") if trial.repeats else None


def _seed_effects(repeated: Sequence[Sequence[TrialOutcome]], metric: str) -> dict[Any, float]:
    """How much better or worse each seed is for the repeated trials on average. Their order does not depend on it."""
    differences: dict[Any, list[float]] = {}
    for group in repeated:
        mean = fmean([trial.metrics[metric] for trial in group])
        for trial in group:
            differences.setdefault(_seed(trial), []).append(trial.metrics[metric] - mean)
    return {seed: fmean(values) for seed, values in differences.items()}


def _noise(repeated: Sequence[Sequence[TrialOutcome]], metric: str, effects: dict[Any, float]) -> float:
    """Standard deviation between seeds of a trial's value, without the effect that a seed has on all trials."""
    squares = 0.0
    for group in repeated:
        values = [trial.metrics[metric] - effects.get(_seed(trial), 0.0) for trial in group]
        squares += sum((value - fmean(values)) ** 2 for value in values)
    freedom = sum(len(group) - 1 for group in repeated) - max(0, len(effects) - 1)
    return math.sqrt(squares / max(1, freedom))


def _within_noise(best: Candidate, other: Candidate, noise: dict[str, float]) -> bool:
    return all(
        abs(best.means[name] - other.means[name])
        <= STANDARD_ERRORS * deviation * math.sqrt(1 / best.count + 1 / other.count)
        for name, deviation in noise.items()
    )
