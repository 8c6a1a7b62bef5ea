"""The training loop on Ray Train's workers."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from pydantic import TypeAdapter
from ray.train.v2.api.callback import UserCallback

from pipeline.data.feed.ray_feed import with_transport
from pipeline.errors import StorageFull, UserError
from pipeline.run_folder import REFUSAL, Fault, FaultKind, Refusal
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training import faults
from pipeline.training.batches import feed_of
from pipeline.training.checks import prepare_worker
from pipeline.training.config import TrainConfig
from pipeline.training.console import printing_to_log
from pipeline.training.distributed import gathered
from pipeline.training.loop import train
from pipeline.training.ray_compat import (
    CheckedTorchConfig,
    PlacementGroupCleanup,
    PreemptionNotice,
    SavingTrainer,
    cause_of,
    remove_orphaned_placement_groups,
    reports,
)
from pipeline.training.stopping import SAVE, STOP
from pipeline.training.validation_sets import ImageFile, ValidationSet, file_set, open_sets
from pipeline.training.worker import Worker

ELASTIC_START_S = 30.0
RESIZE_S = 10.0
MIN_HUNG_S = 30.0
_IMAGES: TypeAdapter[Any] = TypeAdapter(dict[str, list[ImageFile]])


def fit(
    config: TrainConfig,
    run: Storage,
    sets: Sequence[ValidationSet] = (),
    callbacks: Sequence[UserCallback] = (),
) -> None:
    """Trains on Ray's workers until the run is done.

    Ray Train's controller replaces a failed worker group, and this function a failed controller; both resume at the
    newest valid checkpoint. `RestartPolicy` decides when they no longer do.

    Args:
        config: with absolute paths.
        sets: files of `validation.sets`.
        callbacks: further listeners of reports (a trial's link to Ray Tune).

    Raises:
        UserError: a worker refused to continue, or training diverged.
        RuntimeError: a recurring failure.
    """
    REFUSAL.remove(run)
    faults.clear(run)
    _set_timeouts(config)
    while True:
        # A controller that died while its workers were starting would keep their CPUs.
        remove_orphaned_placement_groups()
        SAVE.end(run)
        failure = None
        try:
            _trainer(config, run, sets, callbacks).fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            failure = error
        if _decide(config, run, done=failure is None).action == "continue":
            return
        assert failure is not None
        # Failures of workers were recorded by the controller: this one is the controller's own.
        fault = _record(run, "died", f"Ray Train's controller stopped ({_last_line(failure)})")
        print(f"{fault.text}; starting another at step {max(fault.step, 0)}", flush=True)
        _decide(config, run, done=False)


def _decide(config: TrainConfig, run: Storage, done: bool) -> faults.Decision:
    """The policy's decision; raises its reason if it is to give up."""
    refusal = REFUSAL.read(run)
    decision = faults.RestartPolicy(config.faults.max_restarts).decide(faults.load(run), refusal, done)
    if decision.action == "give up":
        if refusal is not None and refusal.storage_full:
            raise StorageFull(decision.reason)
        if decision.user_error:
            raise UserError(decision.reason)
        raise RuntimeError(f"run {config.run_name} stopped: {decision.reason}")
    return decision


def _trainer(
    config: TrainConfig, run: Storage, sets: Sequence[ValidationSet], callbacks: Sequence[UserCallback]
) -> SavingTrainer:
    low, high = config.worker_range
    return SavingTrainer(
        _worker_loop,
        run=run,
        # Plain values only: each worker opens its own files.
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "run": run.uri,
            "sets": _IMAGES.dump_python({each.name: each.images for each in sets}),
            "is_trial": bool(callbacks),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=high if low == high else (low, high),
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
            elastic_resize_monitor_interval_s=10.0,
        ),
        torch_config=CheckedTorchConfig(
            backend="nccl" if config.use_gpu else "gloo",
            timeout_s=round(config.faults.collective_timeout_s),
            prepare_worker=partial(
                prepare_worker, config.use_gpu, high > 1, config.data.root, config.data.local_cache
            ),
            refuse=partial(_refuse, run.uri),
        ),
        run_config=ray.train.RunConfig(
            # A unique name: runs resume from our checkpoints, never from Ray Train's own state.
            name=f"{config.run_name}-{time.time_ns():x}",
            storage_path=run.path("ray"),
            # Ray counts failures over the whole run; RestartPolicy counts since the newest checkpoint.
            failure_config=ray.train.FailureConfig(
                max_failures=-1, controller_failure_limit=config.faults.max_restarts
            ),
            callbacks=[
                _FaultLog(run.uri, bool(callbacks)),
                PlacementGroupCleanup(),
                PreemptionNotice(),
                *callbacks,
            ],
            # At INFO, Ray logs every report of every worker.
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _worker_loop(loop_config: Mapping[str, Any]) -> None:
    """Runs on every worker: builds its context and enters the loop."""
    config = TrainConfig.model_validate(loop_config["config"])
    run = Storage(loop_config["run"])
    earlier = faults.load(run)
    policy = faults.RestartPolicy(config.faults.max_restarts)
    if policy.decide(earlier, REFUSAL.read(run)).action == "give up":
        return  # the driver raises the reason
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        report=lambda metrics: ray.train.report(dict(metrics)),
        preempted=lambda: ray.train.get_preemption_info() is not None,
        stopping=lambda: context.get_world_rank() == 0 and STOP.is_open(run),
        resizing=lambda: isinstance(config.workers, tuple) and SAVE.is_open(run),
        ready_to_resize=lambda: _await_resize(config, run),
        reason=faults.restart_reason(run, earlier, context.get_world_size())
        if context.get_world_rank() == 0
        else "",
    )
    with _output(run, loop_config["is_trial"]):
        _train(config, run, worker, loop_config["sets"])


def _train(config: TrainConfig, run: Storage, worker: Worker, files: Any) -> None:
    """Opens the worker's files and enters the loop."""
    try:
        feed = with_transport(
            feed_of(config, worker),
            config.data.feed,
            gathered(ray.get_runtime_context().get_node_id()),
            config.cpus_per_worker,
        )
        # Ray logs every report at INFO, from a logger that ignores `logging_config`.
        logging.getLogger(reports.__file__).setLevel(logging.WARNING)
        images = _IMAGES.validate_python(files)
        sets = open_sets(config, [file_set(name, of_set) for name, of_set in images.items()])
        train(config, worker, run, feed, sets)
    except UserError as error:
        _refuse(run.uri, str(error), isinstance(error, StorageFull))


def _output(run: Storage, is_trial: bool) -> AbstractContextManager[None]:
    """Where a process prints: a trial's log file on a file system. An object store has one only of the trial itself."""
    return printing_to_log(run) if is_trial and not run.remote else nullcontext()


def _refuse(run: str, reason: str, storage_full: bool = False) -> None:
    """Ends the run: a restart cannot help, and the driver raises the reason. Raises Refused."""
    REFUSAL.write(Storage(run), Refusal(reason, storage_full))
    raise faults.Refused(reason)


def _await_resize(config: TrainConfig, run: Storage) -> None:
    """Ends the request for a checkpoint, and waits for the controller to end this worker group.

    Further steps would be lost. The other ranks wait for rank 0 in their next collective.
    """
    SAVE.end(run)
    time.sleep(min(RESIZE_S, config.faults.collective_timeout_s / 2))


class _FaultLog(UserCallback):
    """Logs and records the reason a worker group failed; runs in Ray Train's controller."""

    def __init__(self, run: str, is_trial: bool) -> None:
        self._run, self._is_trial = run, is_trial

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """One or more workers failed."""
        run = Storage(self._run)
        if REFUSAL.read(run) is not None:
            return  # the driver raises it
        rank, error = min(
            worker_exceptions.items(), key=lambda item: (_ROOT_CAUSES.index(_kind(item[1])), item[0])
        )
        kind = _kind(error)
        # Without the rank: an error that all ranks have is the same error, whichever is reported first.
        text = str(cause_of(error)) if kind == "diverged" else f"a worker stopped: {_last_line(error)}"
        fault = _record(run, kind, text)
        with _output(run, self._is_trial):
            print(
                f"worker {rank} stopped: {_last_line(error)}; resuming at step {max(fault.step, 0)}",
                flush=True,
            )


# Root-cause order: when one worker dies, the others fail in collectives.
_ROOT_CAUSES: tuple[FaultKind, ...] = ("died", "diverged", "error")


def _kind(error: Exception) -> FaultKind:
    if _is_death(error):
        return "died"
    return "diverged" if isinstance(cause_of(error), faults.Diverged | faults.OutOfMemory) else "error"


def _is_death(error: BaseException) -> bool:
    failure = getattr(error, "health_check_failure", error)
    return isinstance(failure, ray.exceptions.RayActorError)


def _last_line(error: BaseException) -> str:
    """The error in one line."""
    if _is_death(error):
        return "its process ended"
    lines = [line.strip() for line in str(cause_of(error)).splitlines() if line.strip()]
    return f"{type(cause_of(error)).__name__}: {lines[-1] if lines else ''}"[:400]


def _record(run: Storage, kind: FaultKind, text: str) -> Fault:
    names = checkpoints.listed(run)
    return faults.record(run, names[-1].step if names else -1, kind, text)


def _set_timeouts(config: TrainConfig) -> None:
    """Ray Train reads these from the driver's environment."""
    low, high = config.worker_range
    start_s = config.faults.worker_start_timeout_s
    # A group may be planned on nodes whose loss Ray has not noticed; an elastic one is then planned again, smaller.
    start_s = start_s if low == high else min(start_s, ELASTIC_START_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_s)
    # While a rank waits for another one in Ray Train's own barrier (in `report`), no collective times out.
    hung_s = max(config.faults.collective_timeout_s, MIN_HUNG_S)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(hung_s)
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # PreemptionNotice replaces it
    # With Ray Train's print patch, every line that a worker prints appears twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # Ray Train takes one report per poll; its default of 2 s would delay runs with short intervals.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
