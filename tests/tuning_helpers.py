"""A sweep without Ray: the queue's jobs, one after another, in a thread of this process."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiny import fields, flags

from pipeline.config import load_config
from pipeline.data import has_manifest, load_manifest, prepare
from pipeline.run_folder import TrialOutcome
from pipeline.storage import Storage
from pipeline.training.config import TrainConfig
from pipeline.training.selection import with_selection
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.job import Job
from pipeline.tuning.sweep import trial_base
from pipeline.tuning.trial import train_job
from pipeline.tuning.trial_queue import TrialQueue

SPACE = {
    "gan.adversarial_weight": {"low": 1e-4, "high": 5e-2, "log": True},
    "model.residual_scale": {"choice": [0.1, 0.2]},
}


def sweep_fields(folder: Path, **changes: Any) -> dict[str, Any]:
    """Flat fields of a sweep of three tiny trials with one worker."""
    return fields(
        folder,
        **{"workers": 1, "tune.name": "sweep", "tune.trials": 3, "tune.space": SPACE, **changes},
    )


def configurations(folder: Path, **changes: Any) -> tuple[TrainConfig, TuneConfig]:
    """The training configuration and the sweep of these fields."""
    config, _ = load_config(flags(sweep_fields(folder, **changes)), description="", environment={})
    return config.alone(), config.tune


def open_queue(folder: Path, retry_failed: bool = False, **changes: Any) -> TrialQueue:
    """The queue of a sweep with these fields; prepares the data set if it is missing."""
    config, settings = configurations(folder, **changes)
    if not has_manifest(config.data.root):
        prepare(config.data, on_ray=False)
    base = with_selection(trial_base(config), has_held_out=True)
    sha256 = load_manifest(base.data.root).sha256
    sweep = Storage(base.storage) / settings.name
    return TrialQueue(settings, base, sweep, sha256, settings.max_concurrent, retry_failed)


def run_job(
    queue: TrialQueue, job: Job, on_report: Callable[[str, int], object] | None = None
) -> TrialOutcome:
    """Trains one job that the queue has started, and reports its end to the queue."""
    outcomes: list[TrialOutcome] = []

    def report(metrics: Mapping[str, float]) -> None:
        values = dict(metrics)
        step = int(values.pop("step"))
        queue.validated(job.name, step, values)
        if on_report:
            on_report(job.name, step)

    def work() -> None:
        outcomes.append(train_job(job, queue.settings, None, report))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    queue.ended(job.name, outcomes[0])
    return outcomes[0]


def run_all(queue: TrialQueue, on_report: Callable[[str, int], object] | None = None) -> list[Job]:
    """Runs all jobs of a queue, one at a time, and returns them in this order."""
    jobs = []
    while not queue.done:
        job = queue.next()
        if job is None:  # the remaining trials have failed with their stage 1
            break
        jobs.append(job)
        run_job(queue, job, on_report)
    return jobs
