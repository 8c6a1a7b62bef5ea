"""The training loop on Ray Train's workers; with `ray_internals`, the only modules here that import Ray."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.v2.api.callback import UserCallback

from pipeline.data import read_held_out
from pipeline.data.ingest import join_ray
from pipeline.data.ray_feed import FeedDataConfig
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training import faults
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.ray_internals import (
    ENV_VARS_TO_PROPAGATE,
    PlacementGroupCleanup,
    SavingTrainer,
    remove_orphaned_placement_groups,
    reports,
)
from pipeline.training.stopping import end_save_request, save_requested, stop_requested
from pipeline.training.worker import Worker

REFUSAL = "refusal.json"
ELASTIC_START_S = 30.0
RESIZE_S = 10.0


def connect(config: TrainConfig) -> None:
    """Joins or starts Ray, and waits for the nodes that the workers need where they start on demand.

    A Ray of our own gets its dashboard: without it Ray Train cannot see that a controller is gone, keeps the CPUs of
    trials that were stopped, and says so every second.

    Raises:
        UserError: the workers want more CPUs or GPUs than there are.
    """
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        _require_cpus(config, {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())})
    join_ray(dashboard=True)
    deadline = time.monotonic() + config.wait_for_nodes_s
    if config.wait_for_nodes_s:
        _ask_for_nodes(config)
    while True:
        try:
            return _require_cpus(config, ray.cluster_resources())
        except UserError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))


def fit(config: TrainConfig, run: Storage, callbacks: Sequence[UserCallback] = ()) -> None:
    """Trains on Ray's workers until the run is done.

    Workers that die are replaced, and the group goes on from the newest sound checkpoint. So does a new controller
    when Ray Train's own dies.

    Args:
        config: the configuration, with absolute paths.
        run: the run's folder.
        callbacks: what else listens to reports (a trial's link to Ray Tune).

    Raises:
        UserError: a worker refused to go on.
        RuntimeError: a fault that comes again and again; see `faults.verdict`.
    """
    run.remove(REFUSAL)
    faults.clear(run)
    _set_timeouts(config)
    while True:
        # A controller that died while its workers were starting would keep the CPUs from the next one.
        remove_orphaned_placement_groups()
        end_save_request(run)
        try:
            with _told_address():
                _trainer(config, run, callbacks).fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            _raise_refusal(run)
            _raise_verdict(config, run)
            # The workers' own faults are dealt with by the controller: this is the controller's.
            fault = _note(run, "died", f"Ray Train's controller stopped ({_last_line(error)})")
            print(f"{fault.text}; starting another from step {max(fault.step, 0)}", flush=True)
            _raise_verdict(config, run)
            continue
        _raise_refusal(run)
        _raise_verdict(config, run)
        return


def _trainer(config: TrainConfig, run: Storage, callbacks: Sequence[UserCallback]) -> SavingTrainer:
    low, high = config.worker_range
    return SavingTrainer(
        _worker_loop,
        run=run,
        # Plain values only: what a worker needs it opens itself.
        train_loop_config={"config": config.model_dump(mode="json"), "run": run.uri},
        scaling_config=ray.train.ScalingConfig(
            num_workers=high if low == high else (low, high),
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
            elastic_resize_monitor_interval_s=10.0,
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if config.use_gpu else "gloo", timeout_s=round(config.faults.collective_timeout_s)
        ),
        datasets={"train": lambda: None},
        dataset_config=FeedDataConfig(
            root=config.data.root,
            seed=config.seed,
            batch_size=config.batch_size,
            crop_px=config.crop_px,
            feed=config.data.feed,
            cpus_per_worker=config.cpus_per_worker,
        ),
        run_config=ray.train.RunConfig(
            # Our checkpoints are the truth. A name of its own keeps Ray from resuming by what it remembers.
            name=f"{config.run_name}-{time.time_ns():x}",
            storage_path=run.path("ray"),
            # Ray counts over the whole run; we count since the newest checkpoint, in _FaultLog.
            failure_config=ray.train.FailureConfig(
                max_failures=-1, controller_failure_limit=config.faults.max_restarts
            ),
            callbacks=[_FaultLog(run.uri, config.faults.max_restarts), PlacementGroupCleanup(), *callbacks],
            # At INFO every report of every worker is a line.
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _worker_loop(loop_config: Mapping[str, Any]) -> None:
    """What runs on every worker: builds its surroundings and enters the loop."""
    config = TrainConfig.model_validate(loop_config["config"])
    run = Storage(loop_config["run"])
    earlier = faults.load(run)
    if run.exists(REFUSAL) or faults.verdict(earlier, config.faults.max_restarts):
        return  # The driver raises it.
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
        stopping=lambda: context.get_world_rank() == 0 and stop_requested(run),
        resizing=lambda: isinstance(config.workers, tuple) and save_requested(run),
        ready_to_resize=lambda: _await_resize(config, run),
        reason=faults.why_again(run, earlier, context.get_world_size())
        if context.get_world_rank() == 0
        else "",
    )
    try:
        feed = ray.train.get_dataset_shard("train")
        # A line for every report, from a logger that is named after its file and obeys no `logging_config`.
        logging.getLogger(reports.__file__).setLevel(logging.WARNING)
        train(config, worker, run, feed, read_held_out(config.data.root))
    except UserError as error:
        # Trying again cannot help, so the worker ends without a failure and leaves the reason to the driver.
        run.write_bytes(REFUSAL, json.dumps({"message": str(error)}).encode())
        # Others may be waiting for this worker; without its connections they fail now and not at the time-out.
        if dist.is_initialized():
            dist.destroy_process_group()


def _await_resize(config: TrainConfig, run: Storage) -> None:
    """Ends the request for a checkpoint, and gives the controller time to end this worker group.

    Steps from here on would be lost. The other ranks wait for rank 0 in their next collective.
    """
    end_save_request(run)
    time.sleep(min(RESIZE_S, config.faults.collective_timeout_s / 2))


class _FaultLog(UserCallback):
    """Says and keeps why a group of workers stopped; runs in Ray Train's controller."""

    def __init__(self, run: str, max_restarts: int) -> None:
        self._run, self._max_restarts = run, max_restarts

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """One or more workers stopped with an error."""
        run = Storage(self._run)
        rank, error = min(worker_exceptions.items(), key=lambda item: (_BLAME.index(_kind(item[1])), item[0]))
        kind = _kind(error)
        # Without the worker's number: an error that all of them have is the same whoever reports it first.
        text = str(_cause(error)) if kind == "diverged" else f"a worker stopped: {_last_line(error)}"
        fault = _note(run, kind, text)
        print(
            f"worker {rank} stopped: {_last_line(error)}; going on from step {max(fault.step, 0)}", flush=True
        )


# The likeliest cause first: when one worker dies, the others fail in their collectives.
_BLAME: tuple[faults.Kind, ...] = ("died", "diverged", "error")


def _kind(error: Exception) -> faults.Kind:
    if _is_death(error):
        return "died"
    return "diverged" if isinstance(_cause(error), faults.Diverged) else "error"


def _is_death(error: BaseException) -> bool:
    failure = getattr(error, "health_check_failure", error)
    return isinstance(failure, ray.exceptions.RayActorError)


def _cause(error: BaseException) -> BaseException:
    """What the training itself raised, inside of Ray Train's wrapping."""
    return getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error


def _last_line(error: BaseException) -> str:
    """The error in one line."""
    if _is_death(error):
        return "its process ended"
    lines = [line.strip() for line in str(_cause(error)).splitlines() if line.strip()]
    return f"{type(_cause(error)).__name__}: {lines[-1] if lines else ''}"[:400]


def _note(run: Storage, kind: faults.Kind, text: str) -> faults.Fault:
    names = checkpoints.listed(run)
    return faults.note(run, names[-1].step if names else -1, kind, text)


def _raise_verdict(config: TrainConfig, run: Storage) -> None:
    noted = faults.load(run)
    message = faults.verdict(noted, config.faults.max_restarts)
    if message is not None:
        if noted[-1].kind == "diverged":
            raise UserError(message)
        raise RuntimeError(f"run {config.run_name} stopped: {message}")


def _raise_refusal(run: Storage) -> None:
    if run.exists(REFUSAL):
        message = json.loads(run.read_bytes(REFUSAL))["message"]
        run.remove(REFUSAL)
        raise UserError(message)


@contextmanager
def _told_address() -> Iterator[None]:
    """Inside, Ray Train's processes learn which Ray is theirs.

    The one that gives back the CPUs of a controller which died looks for any Ray on the machine otherwise, and may ask
    the wrong one.
    """
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


def _set_timeouts(config: TrainConfig) -> None:
    """Ray Train reads these from the driver's environment."""
    low, high = config.worker_range
    start_s = config.faults.worker_start_timeout_s
    # A group is planned on nodes that Ray does not know to be gone yet; an elastic one is then planned again, smaller.
    start_s = start_s if low == high else min(start_s, ELASTIC_START_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_s)
    # With it, every line that a worker prints appears twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # One report is taken per poll; two seconds would hold up runs of short intervals.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def _require_cpus(config: TrainConfig, available: Mapping[str, float]) -> None:
    """Raises UserError when the fewest workers that the configuration accepts do not fit."""
    workers = config.worker_range[0]
    for kind, each in (("CPU", config.cpus_per_worker), ("GPU", float(config.use_gpu))):
        wanted, there = workers * each, available.get(kind, 0.0)
        if wanted > there:
            fits = int(there // each)
            advice = (
                f"use --workers {fits}"
                if fits
                else f"add {kind}s" + (" or set use_gpu=false" if kind == "GPU" else "")
            )
            raise UserError(
                f"workers={workers}: they need {wanted:g} {kind}s, and Ray has {there:g}; {advice}"
            )


def _ask_for_nodes(config: TrainConfig) -> None:
    """Tells Ray's autoscaler what the workers will want, so that nodes start before the workers wait for them."""
    from ray.autoscaler.sdk import request_resources

    bundle = {"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}
    request_resources(bundles=[bundle] * config.worker_range[0])
