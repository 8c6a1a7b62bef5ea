"""Logs the start and the end of each trial, and records trials that Ray Tune stopped or that failed."""

from typing import Any

import ray
from ray import tune

from pipeline.errors import without_secrets
from pipeline.run_folder import IDENTITY, TrialOutcome
from pipeline.storage import Storage
from pipeline.tracking.run import TrackedRun, finish_run
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.space import trial_name
from pipeline.tuning.sweep_folder import keep_outcome, outcomes


class SweepProgress(tune.Callback):
    """Logs a line when a trial starts and when it ends; writes the outcome of a trial that could not do so itself.

    Args:
        settings: what is searched.
        sweep: the sweep's folder.
        tracking_uri: reference to the tracking server's URI, because Ray Tune pickles this object to disk and the URI
            may contain a password.
        experiment_id: MLflow's id of the trials' experiment.
        final_step: the last step of a trial.
    """

    def __init__(
        self,
        settings: TuneConfig,
        sweep: Storage,
        tracking_uri: ray.ObjectRef,
        experiment_id: str,
        final_step: int,
    ) -> None:
        self._settings, self._sweep, self._final_step = settings, sweep, final_step
        self._tracking_uri, self._experiment_id = tracking_uri, experiment_id

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Logs a trial's values."""
        shown = ", ".join(f"{name}={_short(value)}" for name, value in trial.config.items())
        print(f"{trial_name(trial.config)} started: {shown}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial finished, or the scheduler stopped it."""
        self._record(trial, "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        error = trial.get_error() if hasattr(trial, "get_error") else None
        lines = str(error).strip().splitlines()
        self._record(trial, "failed", without_secrets(lines[-1]) if lines else "its process ended")

    def _record(self, trial: Any, status: str, reason: str = "") -> None:
        name = trial_name(trial.config)
        ended = {outcome.run_name: outcome for outcome in outcomes(self._sweep)}
        if name not in ended:
            last = trial.last_result or {}
            metrics = {key: value for key, value in last.items() if key.startswith(("psnr_", "ssim_"))}
            run = self._sweep / "trials" / name
            identity = IDENTITY.read(run)
            run_id = identity.tracking_run_id if identity else None
            ended[name] = TrialOutcome(
                name, run_id, dict(trial.config), status, int(last.get("step", 0)), metrics, reason
            )
            keep_outcome(self._sweep, ended[name])
            if run_id is not None:
                tracked = TrackedRun(ray.get(self._tracking_uri), run_id, self._experiment_id, run.uri)
                finish_run(tracked, "KILLED" if status == "stopped" else "FAILED", reason=reason)
        outcome = ended[name]
        metric = self._settings.metric
        shown = f"{metric} {outcome.metrics[metric]:.4f}" if metric in outcome.metrics else outcome.reason
        print(
            f"{name} {outcome.status} at step {outcome.step}/{self._final_step}: {shown} "
            f"({len(ended)}/{self._settings.trials})",
            flush=True,
        )


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
