"""One job of a sweep, in the process that Ray Tune starts for it: a trial, or the stage 1 that several trials share."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.errors import StorageFull, UserError, without_secrets
from pipeline.run_folder import TrainingResult, TrialOutcome
from pipeline.storage import Storage, only_writer
from pipeline.tracking.spool import validations
from pipeline.training import checkpoint as checkpoints
from pipeline.training import faults
from pipeline.training.config import TrainConfig
from pipeline.training.console import printing_to_log
from pipeline.training.run import run_training
from pipeline.training.stopping import Stopped
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.job import Job, outcome_of
from pipeline.tuning.rungs import compared_from

# A process of an earlier submission may need so long to notice that its driver is gone.
LOCK_S = 60.0


def train_job(
    job: Job,
    settings: TuneConfig,
    parent_run_id: str | None,
    report: Callable[[Mapping[str, float]], None],
    callbacks: Sequence[Any] = (),
) -> TrialOutcome:
    """Trains a job to its end, or until it is stopped; a fault of the training becomes the outcome.

    A stopped job has the status `interrupted`: it resumes from its checkpoint. Not for the main thread, in which
    signals stop a run.

    Raises:
        Exception: the fault has made the process's GPU unusable, so the process must end.

    Args:
        parent_run_id: MLflow's id of the sweep's run.
        report: called after every validation with its metrics and `step`, if the job trains in this process.
        callbacks: Ray Train callbacks that report otherwise.
    """
    began = time.monotonic()
    outcome = outcome_of(job.name, job.plan, "interrupted")
    with printing_to_log(job.run):
        try:
            _await_lock(job.run)
            if job.stage_one:
                _adopt(job)
            outcome = _finished(job, settings, outcome, _train(job, parent_run_id, report, callbacks))
        except Stopped as stopped:
            print(stopped, flush=True)
        except Exception as error:
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if not isinstance(error, UserError):
                print(without_secrets(traceback.format_exc()), flush=True)
            print(f"error: {without_secrets(text)}", flush=True)
            if _is_gpu_unusable(job.config):
                raise
            outcome = replace(
                outcome,
                status="failed",
                reason=without_secrets(" ".join(text.split()))[:500],
                retry=isinstance(error, OSError | StorageFull) or _has_lost_workers(job.run, error),
            )
    if outcome.status != "finished":
        step, metrics = max(_measured(job).items(), default=(0, {}))
        outcome = replace(outcome, step=step, metrics=metrics)
    return replace(outcome, seconds=round(time.monotonic() - began, 1))


def _measured(job: Job) -> dict[int, dict[str, float]]:
    """Metrics of the validations of the compared stage, by step."""
    start = compared_from(job.config)
    return {step: metrics for step, metrics in validations(job.run).items() if step > start}


def _train(
    job: Job,
    parent_run_id: str | None,
    report: Callable[[Mapping[str, float]], None],
    callbacks: Sequence[Any],
) -> TrainingResult:
    torch.set_num_threads(max(1, int(job.config.cpus_per_worker)))
    try:
        return run_training(
            job.config,
            report=report,
            callbacks=callbacks,
            parent_run_id=parent_run_id,
            compare_versions=False,  # a sweep that resumes after an upgrade compares trials, not bits
            initial_from=job.config.storage.rpartition("/")[0],
        )
    finally:
        if job.config.use_gpu and not _is_gpu_unusable(job.config):
            torch.cuda.empty_cache()  # the process trains further trials


def _has_lost_workers(run: Storage, error: Exception) -> bool:
    """Whether a run on Ray Train ended because its processes or nodes were lost, not because of what it trains."""
    recorded = faults.load(run)
    return isinstance(error, RuntimeError) and bool(recorded) and recorded[-1].kind == "died"


def _is_gpu_unusable(config: TrainConfig) -> bool:
    """Whether a CUDA error, such as an illegal memory access, makes every later call in this process fail."""
    if not config.use_gpu or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _finished(job: Job, settings: TuneConfig, outcome: TrialOutcome, result: TrainingResult) -> TrialOutcome:
    """The outcome of a trial that reached its last step; `tune.value` decides which validation it is compared by."""
    step, metrics = result.step, result.final_metrics
    measured = _measured(job)
    if settings.value == "best":
        metrics = result.metrics
        step = max((at for at, values in measured.items() if values == metrics), default=step)
    elif settings.value == "mean" and job.kind == "trial":
        # Without the records of its validations, the last one is known from the result.
        last = list(measured.values())[-settings.mean_validations :] or [metrics]
        metrics = {name: sum(values[name] for values in last) / len(last) for name in metrics}
    return replace(outcome, run_id=result.run_id, status="finished", step=step, metrics=metrics)


def _adopt(job: Job) -> None:
    """Copies the last checkpoint of the shared stage 1 to a trial that has no checkpoint yet."""
    if checkpoints.listed(job.run):
        return
    try:
        checkpoints.copy(
            Storage(job.stage_one), job.run, checkpoints.CheckpointName(job.config.psnr.steps, "psnr")
        )
    except checkpoints.CorruptCheckpoint as error:
        print(f"training stage 1 again: the shared checkpoint is unreadable ({error})", flush=True)


def _await_lock(run: Storage) -> None:
    """Waits until no other process trains the run. Raises TimeoutError, an OSError: not the trial's fault."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            with only_writer(run, "locked"):
                return
        except UserError:
            if time.monotonic() > deadline:
                text = f"{run.uri}: another process has been training this trial for {LOCK_S:.0f} s"
                raise TimeoutError(text) from None
        time.sleep(0.5)
