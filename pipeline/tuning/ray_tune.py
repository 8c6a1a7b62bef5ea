"""Ray Tune runs the jobs of a sweep: each has its resources, waits for them, and is restarted when its process dies."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from pydantic import TypeAdapter
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import Searcher

from pipeline.errors import UserError, without_secrets
from pipeline.metrics.names import METRICS, metric_of
from pipeline.run_folder import OUTCOME
from pipeline.tracking.run import TrackedRun
from pipeline.training.config import TrainConfig
from pipeline.training.stopping import STOP
from pipeline.tuning.job import Job
from pipeline.tuning.status import status_lines
from pipeline.tuning.trial import train_job
from pipeline.tuning.trial_queue import TrialQueue

STATUS_S = 180.0
POLL_S = 1.0
LOST = "its process ended (killed, out of memory, or a fault of the GPU); see its log.txt"
_ENDED = ("ERROR", "TERMINATED")
_JOB = TypeAdapter(Job)


def run_jobs(queue: TrialQueue, parent: TrackedRun) -> None:
    """Runs the queue's jobs until there are no more, or until the sweep is stopped.

    Raises:
        UserError: the sweep's folder could not be written, or trials failed for another reason outside of them; the
            running jobs have been stopped.
        KeyboardInterrupt, SystemExit: from signals; the jobs' processes end with Ray Tune.
    """
    settings, base, sweep = queue.settings, queue.base, queue.sweep
    # Ray Tune pickles what it runs into the sweep's folder, so the tracking URI, which may contain a password, is
    # passed by reference.
    tracking_uri, parent_run_id = ray.put(parent.uri), parent.run_id
    _set_environment()

    def run_job(parameters: dict[str, Any]) -> None:
        job = _JOB.validate_json(parameters["job"])
        tracking = job.config.tracking.model_copy(update={"uri": ray.get(tracking_uri)})
        job = replace(job, config=job.config.model_copy(update={"tracking": tracking}))
        callbacks = [TuneReportCallback()] if job.config.worker_range[1] > 0 else []
        outcome = train_job(
            job, settings, parent_run_id, lambda metrics: tune.report(dict(metrics)), callbacks
        )
        tune.report({"step": outcome.step, "outcome": OUTCOME.dump(outcome).decode()})

    listener = Listener(queue)
    tuner = tune.Tuner(
        tune.with_resources(run_job, _resources(base)),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=JobSearch(queue, listener),
            # A new process takes seconds to start; one that fails is replaced.
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.config["name"],
        ),
        run_config=tune.RunConfig(
            name=f"{time.time_ns():x}",
            storage_path=sweep.path("ray"),
            callbacks=[listener],
            failure_config=tune.FailureConfig(max_failures=base.faults.max_restarts),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        sweep.remove("ray")
    if listener.failure:
        raise listener.failure
    if queue.failure:
        raise UserError(f"{sweep.uri}: stopped ({queue.failure}); run again to resume")


def fitting(base: TrainConfig, nodes: Sequence[Mapping[str, Any]]) -> int:
    """How many trials fit into the cluster at a time, by CPUs and GPUs of its nodes."""
    workers = 0
    for node in nodes:
        resources = node.get("Resources", {}) if node.get("Alive", True) else {}
        fits = resources.get("CPU", 0.0) / base.cpus_per_worker
        if base.use_gpu:
            fits = min(fits, resources.get("GPU", 0.0))
        workers += int(fits + 1e-9)
    return workers // max(1, base.worker_range[0])


class JobSearch(Searcher):
    """Hands the queue's jobs to Ray Tune."""

    def __init__(self, queue: TrialQueue, listener: "Listener") -> None:
        super().__init__()
        self._queue, self._listener = queue, listener

    def suggest(self, trial_id: str) -> Any:
        job = None
        with self._listener.stopping_on_failure():
            job = None if self._queue.done else self._queue.next()
        if job is None:
            return Searcher.FINISHED if self._queue.done else None
        return {"name": job.name, "job": _JOB.dump_json(job).decode()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the listener passes it on to the queue."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep resumes from its own files."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Listener(tune.Callback):
    """Passes on what happens to the jobs, and prints the state of the sweep every few minutes."""

    def __init__(self, queue: TrialQueue, poll_s: float = POLL_S) -> None:
        """`poll_s`: seconds between two checks of the time limit and of requests to stop."""
        self._queue, self._poll_s = queue, poll_s
        self._began = self._polled = self._printed = time.monotonic()
        self.failure: UserError | None = None
        """Why the sweep's folder could not be written."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A job was validated; the report of its end is read by `on_trial_complete`."""
        name = trial.config["name"]
        if "outcome" in result:
            return
        metrics = {key: float(value) for key, value in result.items() if metric_of(key) in METRICS}
        if "step" in result and name in self._queue.running:
            with self.stopping_on_failure():
                self._queue.validated(name, int(result["step"]), metrics)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A job's function has returned."""
        name = trial.config["name"]
        content = (trial.last_result or {}).get("outcome")
        with self.stopping_on_failure():
            if content is None:
                self._queue.lost(name, LOST)
            else:
                self._queue.ended(name, OUTCOME.parse(content.encode()))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A job's process died, and Ray Tune starts another."""
        print(f"{trial.config['name']}: its process ended; starting another", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A job's process died too often."""
        with self.stopping_on_failure():
            self._queue.lost(trial.config["name"], LOST)

    @contextmanager
    def stopping_on_failure(self) -> Iterator[None]:
        """Ends the sweep when its folder cannot be written: Ray Tune would end without the other trials' outcomes."""
        try:
            yield
        except OSError as error:
            reason = without_secrets(str(error))
            self.failure = UserError(f"{self._queue.sweep.uri}: not written ({reason}); run again to resume")
            with suppress(OSError):
                self._queue.stop()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Ray Tune has processed its events."""
        now = time.monotonic()
        if now < self._polled + self._poll_s:
            return
        self._polled = now
        with self.stopping_on_failure():
            self._find_lost(trials)
            self._check_for_stop(now)
        if now > self._printed + STATUS_S and self._queue.running:
            self._printed = now
            print(*status_lines(self._queue, now - self._began), sep="\n", flush=True)

    def _find_lost(self, trials: list[Any]) -> None:
        """Ray Tune ends some trials without a callback, for example when it cannot reset a process for the next one."""
        ended = {trial.config["name"] for trial in trials if trial.status in _ENDED}
        active = {trial.config["name"] for trial in trials if trial.status not in _ENDED}
        for name in (ended - active) & set(self._queue.running):
            self._queue.lost(name, LOST)

    def _check_for_stop(self, now: float) -> None:
        queue = self._queue
        hours = queue.settings.max_hours
        if not queue.stopping and hours is not None and now > self._began + 3600 * hours:
            print(
                f"tune.max_hours={hours:g} is over: running trials save and stop; run again to resume",
                flush=True,
            )
            queue.stop()
        if not queue.stopping and STOP.is_open(queue.sweep):
            queue.stop()


def _resources(base: TrainConfig) -> Any:
    """What a trial requests; Ray Train itself requests its workers, and could not get CPUs that the trial holds."""
    if base.worker_range[1] > 0:
        return {"CPU": 0, "memory": 2**20}
    return {"CPU": base.cpus_per_worker, **({"GPU": 1} if base.use_gpu else {})}


def _set_environment() -> None:
    """Ray Tune reads these when a sweep starts."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the command instead of only the search
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"  # nothing is read from its snapshots
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "10"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its tables are printed also with verbose=0
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the listener prints what happens
