"""Preflight checks: what can be checked before Ray starts, and on each worker before it joins its process group."""

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.data import Manifest
from pipeline.data.format.local_copy import local_copy
from pipeline.errors import StorageFull, UserError, is_installed, require_package
from pipeline.metrics import require
from pipeline.model import Lite0Features, VGGFeatures
from pipeline.model.device import require_gpu
from pipeline.model.features import PROVIDED
from pipeline.section import flat_fields, with_fields
from pipeline.storage import Storage, absolute, is_remote
from pipeline.training.config import TrainConfig
from pipeline.training.init_config import NETWORKS
from pipeline.training.model_source import shipped_model
from pipeline.training.selection import measured_metrics, metric_key
from pipeline.training.state import build_discriminator, build_generator
from pipeline.training.validation_config import HELD_OUT

NCCL_HEARTBEAT_S = 60


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """`config` with absolute local paths, which mean the same on every worker.

    Raises:
        UserError: a relative path in a job that runs in a temporary copy of the working directory.
    """
    sets = config.validation.model_dump()["sets"]
    copied = "/runtime_resources/working_dir_files/" in f"{Path.cwd()}/"  # of `ray job submit --working-dir`
    shared = {"storage": config.storage, "data.root": config.data.root}
    for field, path in {**shared, **flat_fields({"validation.sets": sets})}.items():
        relative = not is_remote(path) and not Path(path).expanduser().is_absolute()
        if relative and copied:
            raise UserError(
                f"{field}={path}: relative to a copy of the working directory, which Ray deletes after the job; "
                f"give an absolute path or an s3:// prefix, for example --{field} {Path.home() / path}"
            )
    paths = {
        **shared,
        "data.local_cache": config.data.local_cache,
        "validation.weights_folder": config.validation.weights_folder,
    }
    if config.perceptual.weights not in PROVIDED:
        paths["perceptual.weights"] = config.perceptual.weights
    changes: dict[str, Any] = {field: absolute(path) for field, path in paths.items() if path is not None}
    changes["validation.sets"] = {
        name: absolute(folders)
        if isinstance(folders, str)
        else {kind: absolute(path) for kind, path in folders.items()}
        for name, folders in sets.items()
    }
    for network in NETWORKS:
        changes[f"init.{network}"] = _absolute_source(f"init.{network}", getattr(config.init, network))
    return with_fields(config, changes)


def _absolute_source(field: str, source: str | None) -> str | None:
    """A model source with a local path made absolute; it is read before a copied working directory is deleted."""
    if source is None or source.startswith("models:/") or shipped_model(source):
        return source
    try:
        return absolute(source)
    except UserError as error:
        raise UserError(f"{field}={error}, or models:/NAME@ALIAS") from None


def require_metric(field: str, name: str, config: TrainConfig) -> None:
    """Raises UserError, naming `field`, unless the run's validations measure this metric."""
    sets = [HELD_OUT, *config.validation.sets]
    measured = [metric_key(each, metric) for each in sets for metric in measured_metrics(config)]
    if name not in measured:
        raise UserError(
            f"{field}={name}: not measured in validation ({', '.join(measured)}); add it to validation.metrics"
        )


def check_before_start(config: TrainConfig, run: Storage) -> None:
    """Checks everything that needs neither Ray nor the data. Raises UserError."""
    if config.use_gpu and config.workers == 0:
        require_gpu("use_gpu=true", "set use_gpu=false")
    if config.worker_range[1] > 0:
        require_package("ray", f"workers={config.workers}", "set workers=0")
    if config.tracking.enabled and config.tracking.register_model and is_installed("mlflow"):
        needed_for = "tracking.register_model=true (the model has an ONNX file)"
        require_package("onnx", needed_for, "set tracking.register_model=false")
    require(measured_metrics(config), config.validation.weights_folder)
    perceptual_features(config)
    run.require_writable("storage")
    _require_space(config, run)


def require_fitting_data(config: TrainConfig, manifest: Manifest) -> None:
    """Raises UserError if a data set was prepared for another scale or smaller crops."""
    if manifest.scale != config.data.scale:
        raise UserError(
            f"data.scale={config.data.scale}: {config.data.root} was made for scale {manifest.scale}"
        )
    if manifest.patch_px < config.crop_px:
        raise UserError(
            f"crop_px={config.crop_px}: the patches in {config.data.root} have {manifest.patch_px} pixels; "
            "lower crop_px or prepare larger patches"
        )


def perceptual_features(config: TrainConfig) -> VGGFeatures | Lite0Features | None:
    """The network of stage 2's perceptual loss, on the CPU; None if the run does not use it.

    With precision=bf16 its convolutions' weights are bfloat16, for use under autocast.

    Raises:
        UserError: a file that is missing, corrupt, or does not hold the network's weights.
    """
    if not (config.gan.steps and config.gan.perceptual_weight):
        return None
    perceptual = config.perceptual
    features: VGGFeatures | Lite0Features
    if perceptual.weights == "efficientnet_lite0":
        features = Lite0Features(perceptual.layers)
    else:
        features = VGGFeatures(perceptual.layers, perceptual.weights, perceptual.sha256, seed=config.seed)
    if config.precision == "bf16":
        # Autocast would round the same weights again in every step, twice.
        for module in features.modules():
            if isinstance(module, nn.Conv2d):
                module.to(torch.bfloat16)
    return features


def _require_space(config: TrainConfig, run: Storage) -> None:
    """Raises UserError if the checkpoints to be kept do not fit on the disk."""
    free = run.free_bytes()
    # Two more: stage 1's, and one that is being written.
    needed = _checkpoint_bytes(config) * (config.keep_checkpoints + config.keep_best_checkpoints + 2)
    if free is not None and free < needed:
        raise StorageFull(
            f"storage={config.storage}: {free / 2**20:.0f} MiB free, and checkpoints take about "
            f"{needed / 2**20:.0f} MiB; free some space, choose another storage, or lower keep_checkpoints"
        )


def _checkpoint_bytes(config: TrainConfig) -> int:
    """Size of a checkpoint's weights and moments. Raises UserError: no generator has this scale."""
    with torch.device("meta"):
        networks = [build_generator(config), *([build_discriminator(config)] if config.gan.steps else [])]
    generator, *discriminator = (sum(map(torch.numel, network.parameters())) for network in networks)
    # Weights, EMA weights and Adam's two moments; the discriminator has no EMA weights.
    return 4 * (4 * generator + 3 * sum(discriminator))


def prepare_worker(use_gpu: bool, several: bool, root: str, local_cache: str | None) -> str:
    """Checks driver and shared memory, and copies the data set; returns what is missing, or an empty text.

    The copy of a remote data set at `root` to `local_cache` takes minutes: in the process group, others would wait for
    it in a collective. `several`: whether there are several workers.
    """
    # A collective that timed out ends the process; without these the watchdog first collects state for minutes.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(NCCL_HEARTBEAT_S))
    try:
        if several:
            _require_shared_memory(use_gpu)
        if use_gpu:
            require_gpu(f"use_gpu=true, {platform.node()}", "set use_gpu=false")
        local_copy(root, local_cache)
    except UserError as error:
        return str(error)
    return ""


def _require_shared_memory(use_gpu: bool) -> None:
    """Raises UserError if several workers on this machine would not have enough of it.

    GPUs without direct access to each other exchange gradients through /dev/shm; containers have 64 MiB by default.
    """
    folder, needed = Path("/dev/shm"), 2**30 if use_gpu else 2**26
    if folder.is_dir() and (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"/dev/shm on {platform.node()}: {free / 2**20:.0f} MiB free, and several workers need "
            f"{needed / 2**20:.0f}; enlarge it (docker run --shm-size=2g)"
        )
