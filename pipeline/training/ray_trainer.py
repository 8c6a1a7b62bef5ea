"""The training loop on Ray Train's workers. The only file of this room that knows Ray."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2.api.callback import UserCallback

from pipeline.data import read_held_out
from pipeline.data.ingest import join_ray
from pipeline.data.ray_feed import FeedDataConfig
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.worker import Worker

REFUSAL = "refusal.json"


def connect(config: TrainConfig, dashboard: bool = False) -> None:
    """Joins or starts Ray, and waits for the nodes that the workers need where they start on demand.

    Raises:
        UserError: the workers want more CPUs or GPUs than there are.
    """
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        _require_cpus(config, {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())})
    join_ray(dashboard)
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

    Workers that die are replaced, and the group goes on from the newest sound checkpoint.

    Args:
        config: the configuration, with absolute paths.
        run: the run's folder.
        callbacks: what else listens to reports (a trial's link to Ray Tune).

    Raises:
        UserError: a worker refused to go on.
        ray.train.TrainingFailedError: more failures than faults.max_restarts.
    """
    run.remove(REFUSAL)
    low, high = config.worker_range
    _set_timeouts(config)
    trainer = ray.train.torch.TorchTrainer(
        _worker_loop,
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
            failure_config=ray.train.FailureConfig(max_failures=config.faults.max_restarts),
            callbacks=list(callbacks),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError:
        _raise_refusal(run)
        raise
    _raise_refusal(run)


def _worker_loop(loop_config: Mapping[str, Any]) -> None:
    """What runs on every worker: builds its surroundings and enters the loop."""
    config = TrainConfig.model_validate(loop_config["config"])
    run = Storage(loop_config["run"])
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
    )
    try:
        feed = ray.train.get_dataset_shard("train")
        train(config, worker, run, feed, read_held_out(config.data.root))
    except UserError as error:
        # Trying again cannot help, so the worker ends without a failure and leaves the reason to the driver.
        run.write_bytes(REFUSAL, json.dumps({"message": str(error)}).encode())


def _raise_refusal(run: Storage) -> None:
    if run.exists(REFUSAL):
        message = json.loads(run.read_bytes(REFUSAL))["message"]
        run.remove(REFUSAL)
        raise UserError(message)


def _set_timeouts(config: TrainConfig) -> None:
    """Ray Train reads these from the driver's environment."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.faults.worker_start_timeout_s)
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
