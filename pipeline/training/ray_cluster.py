"""Joins or starts the Ray cluster that training runs on."""

import os
import time
from collections.abc import Mapping

import ray
import torch

from pipeline.data.ingest.ray_ingest import join_ray
from pipeline.errors import UserError
from pipeline.training.config import TrainConfig


def connect(config: TrainConfig, log_to_driver: bool = True) -> None:
    """Joins or starts Ray, and waits up to `wait_for_nodes_s` for nodes that are started on demand.

    A locally started Ray runs with the dashboard enabled: without it, Ray Train does not notice that a controller died,
    keeps the CPUs of stopped trials, and logs a warning every second. With `log_to_driver`, this process prints what
    other processes print.

    Raises:
        UserError: the workers need more CPUs or GPUs than there are.
    """
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        _require_cpus(config, {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())})
    join_ray(dashboard=True, log_to_driver=log_to_driver)
    deadline = time.monotonic() + config.wait_for_nodes_s
    if config.wait_for_nodes_s:
        _request_nodes(config)
    while True:
        try:
            return _require_cpus(config, ray.cluster_resources())
        except UserError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))


def _require_cpus(config: TrainConfig, available: Mapping[str, float]) -> None:
    """Raises UserError if the minimum number of workers does not fit."""
    workers = config.worker_range[0]
    for kind, each in (("CPU", config.cpus_per_worker), ("GPU", float(config.use_gpu))):
        needed, present = workers * each, available.get(kind, 0.0)
        if needed > present:
            fits = int(present // each)
            advice = (
                f"use --workers {fits}"
                if fits
                else f"add {kind}s" + (" or set use_gpu=false" if kind == "GPU" else "")
            )
            raise UserError(
                f"workers={workers}: they need {needed:g} {kind}s, and Ray has {present:g}; {advice}"
            )


def _request_nodes(config: TrainConfig) -> None:
    """Requests the workers' resources from Ray's autoscaler, so that nodes start before the workers wait for them."""
    from ray.autoscaler.sdk import request_resources

    bundle = {"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}
    request_resources(bundles=[bundle] * config.worker_range[0])
