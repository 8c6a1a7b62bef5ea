"""The result of a sweep, and the lines that the command prints."""

from dataclasses import dataclass

from pipeline.run_folder import TrialOutcome
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.space import flag_text, shown, shown_metrics


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep."""

    run_id: str
    """MLflow's id of the parent run."""
    trials: list[TrialOutcome]
    """In the ranking's order."""
    best: TrialOutcome | None
    """With several metrics: the knee point of the Pareto front. None: no trial meets the constraints, or the sweep was
    stopped before one had finished."""
    front: list[str]
    """Run names on the Pareto front."""
    tied: list[str]
    """Trials whose difference from the best is within the noise between seeds; empty: the noise was not measured."""
    noise: dict[str, float]
    """Standard deviation of every metric between seeds."""
    means: dict[str, dict[str, float]]
    """Means over the seeds of the repeated trials, by run name; the ranking compares these."""
    figure: str
    """Path of the figure of the searched fields against the metric."""


def trial_table(settings: TuneConfig, result: SweepResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of the trials, in the ranking's order; a repetition has its seed below its trial."""
    metrics, fields = settings.metrics, list(settings.space)
    rows = [
        [
            f"  {trial.run_name}, seed {trial.values['seed']}" if trial.repeats else trial.run_name,
            trial.status,
            str(trial.step),
            *(shown(trial.values.get(name)) for name in fields),
            *(f"{trial.metrics[name]:.4f}" if name in trial.metrics else "-" for name in metrics),
            f"{trial.seconds:.0f}",
        ]
        for trial in result.trials
    ]
    return ["trial", "status", "step", *fields, *metrics, "seconds"], rows


def result_lines(settings: TuneConfig, result: SweepResult) -> list[str]:
    """What is printed below the table: failures, noise, Pareto front, and the best trial."""
    metrics = settings.metrics
    lines = [f"{trial.run_name}: {trial.reason}" for trial in result.trials if trial.status == "failed"]
    for name, means in result.means.items():
        count = 1 + sum(trial.repeats == name and trial.status == "finished" for trial in result.trials)
        lines.append(f"{name}: {shown_metrics(means, metrics)}, mean of {count} seeds")
    if result.noise:
        noise = shown_metrics(result.noise, metrics)
        lines.append(f"noise (standard deviation between seeds): {noise}")
    if len(result.front) > 1:
        lines.append(f"Pareto front: {', '.join(result.front)}")
    best = result.best
    if best is None:
        finished = any(trial.status == "finished" for trial in result.trials)
        reason = f"meets {' and '.join(settings.constraints)}" if finished else "has finished yet"
        return [*lines, f"best: none; no trial {reason}"]
    lines.append(f"figure: {result.figure}")
    if len(result.tied) > 1:
        lines.append(f"the differences between {', '.join(result.tied)} are within the noise between seeds")
    values = " ".join(f"--{name} {flag_text(value)}" for name, value in best.values.items())
    means = result.means.get(best.run_name, best.metrics)
    measured = shown_metrics(means, metrics)
    kind = "knee of the Pareto front" if len(metrics) > 1 else "best"
    lines.append(f"{kind}: {best.run_name} with {measured} at step {best.step}: {values}")
    return lines
