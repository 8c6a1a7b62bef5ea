"""Entry point for training; shared by the job, sweep trials and tests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import yaml

from pipeline.data import Manifest, check_source, has_manifest, load_manifest, plans_held_out, prepare
from pipeline.errors import UserError
from pipeline.run_folder import IDENTITY, RESULT, SWEEP, RunIdentity, TrainingResult
from pipeline.section import flat_fields
from pipeline.storage import Storage, only_writer
from pipeline.tracking.run import finish_run, open_run, require_tracking
from pipeline.tracking.sender import Sender
from pipeline.tracking.spool import published_step
from pipeline.tracking.upload import initial_tags
from pipeline.training import checkpoint as checkpoints
from pipeline.training.batches import feed_of
from pipeline.training.checks import check_before_start, require_fitting_data, with_absolute_paths
from pipeline.training.conclude import conclude, send_later
from pipeline.training.config import TrainConfig
from pipeline.training.faults import Diverged, OutOfMemory
from pipeline.training.identity import check_resume, claim, diff, identity_of
from pipeline.training.initial import origins, resolve_for_run, save_copies
from pipeline.training.loop import train
from pipeline.training.selection import select_key, with_selection
from pipeline.training.state import new_state
from pipeline.training.stopping import STOP, Stopped, saving_on_sigterm
from pipeline.training.validation_sets import ValidationSet, find_sets, open_sets
from pipeline.training.worker import Worker

# Fields that only ingest reads: they describe the images, not the patches.
_INGEST_ONLY = {"source", "held_out", "lr_dir", "license"}


def run_training(
    config: TrainConfig,
    *,
    report: Callable[[Mapping[str, float]], None] = lambda metrics: None,
    callbacks: Sequence[Any] = (),
    parent_run_id: str | None = None,
    accept_changes: bool = False,
    compare_versions: bool = True,
    prepare_command: str | None = None,
    initial_from: str | None = None,
) -> TrainingResult:
    """Runs both stages (resuming an earlier attempt if present) and registers the best generator.

    Args:
        config: `workers: 0` trains in this process, without Ray Train.
        report: called after every validation with its metrics and `step`, if the run trains in this process.
        callbacks: Ray Train callbacks (a trial's link to Ray Tune), otherwise.
        parent_run_id: MLflow run that this one belongs to (a sweep).
        accept_changes: resume although the configuration, the data set or package versions have changed.
        compare_versions: whether a different package version counts as a change.
        prepare_command: refuse a missing data set with this command in the message, instead of preparing it.
        initial_from: folder of the sweep whose copies of the initial weights take the place of their sources.

    Returns:
        The result. For a run that already finished: its stored result; nothing is modified.

    Raises:
        UserError: any error the user can fix, detected before Ray starts where possible.
        Stopped: a stop was requested through the run's folder, outside the main thread (a trial).
    """
    # Sections of other commands (a sweep's) are dropped.
    config = with_absolute_paths(config.alone())
    run = Storage(config.storage) / config.run_name
    if run.exists(SWEEP.path):
        raise UserError(
            f"run_name={config.run_name}: {run.uri} is the folder of a sweep; choose another run_name"
        )
    old, result = IDENTITY.read(run), RESULT.read(run)
    finished = result is not None and result.step == config.psnr.steps + config.gan.steps
    shared = Storage(initial_from) if initial_from else None
    config, initial = resolve_for_run(config, run, old, shared)
    manifest = None if finished or not has_manifest(config.data.root) else load_manifest(config.data.root)

    def require_resumable(manifest: Manifest | None) -> tuple[RunIdentity, list[str]]:
        """The identity that this configuration gives, and its changes, checked; without a manifest all others."""
        sha256 = manifest.sha256 if manifest else (old.manifest_sha256 if old else "")
        new = identity_of(config, sha256, origins(initial))
        if old is None:
            return new, []
        if finished or not compare_versions:
            new = replace(new, versions=old.versions)
        changes = diff(old, new)
        check_resume(config, run, old, new, changes, accept_changes)
        return new, changes

    new, changes = require_resumable(manifest)
    if finished:
        assert result is not None
        print(
            f"run {config.run_name} has finished at step {result.step}; nothing to do ({run.path(RESULT.path)})",
            flush=True,
        )
        return result
    has_held_out = bool(manifest.held_out) if manifest else plans_held_out(config.data)
    config = with_selection(config, has_held_out, checkpoints.chosen_by(run))
    check_before_start(config, run)
    sets = find_sets(config)
    if manifest is None:
        check_source(config.data, prepare_command)
    else:
        require_fitting_data(config, manifest)
    require_tracking(config.tracking, config.storage)

    refusal = (
        f"run_name={config.run_name}: another process is training {run.uri}; wait for it or stop it first"
    )
    with only_writer(run, refusal):
        if accept_changes:
            _require_loadable(config, run)
        if config.worker_range[1] > 0:
            from pipeline.training import ray_cluster

            ray_cluster.connect(config)
        was_prepared = manifest is not None
        if manifest is None:
            prepare(config.data, on_ray=config.worker_range[1] > 0)
            manifest = load_manifest(config.data.root)
            new, changes = require_resumable(manifest)
        identity = claim(run, old, new, changes)
        save_copies(run, initial)
        if parent_run_id is None:
            print(summary(config, manifest), flush=True)
        if was_prepared:
            # The data set may not have been made from data.source.
            data = config.data.model_copy(update=dict.fromkeys(_INGEST_ONLY))
            config = config.model_copy(update={"data": data})
        return _tracked_training(config, run, manifest, identity, sets, report, callbacks, parent_run_id)


def summary(config: TrainConfig, manifest: Manifest) -> str:
    """What is about to be trained, in five lines: data (from the manifest), model, steps, selection, devices."""
    facts, model = manifest.facts(), config.model
    held_out = f"validation on {facts['held_out']}" if facts["held_out"] else "no validation images"
    networks = (
        f"RRDBNet x{manifest.scale}, {model.num_block} blocks, {model.num_feat} features, {model.num_grow_ch} growth "
        f"channels, residual scale {model.residual_scale:g}"
    )
    if config.init.generator:
        networks += f", from {config.init.generator}"
    if config.gan.steps:
        networks += f"; discriminator {model.discriminator}, {model.discriminator_num_feat} features"
        if config.init.discriminator:
            networks += f", from {config.init.discriminator}"
    steps = {"psnr": config.psnr.steps, "gan": config.gan.steps}
    chosen = [f"{select_key(config, stage)} ({stage})" for stage, count in steps.items() if count]
    low, high = config.worker_range
    count = f"{low} to {high}" if low != high else str(high)
    workers = f"{count} Ray Train worker{'s' * (high != 1)}" if high else "this process, without Ray Train"
    return "\n".join(
        [
            f"data:    {config.data.root}: {manifest.patches} patches of {manifest.patch_px} px from "
            f"{facts['source'] or 'unlisted images'}; {held_out}",
            f"model:   {networks}",
            f"steps:   {config.psnr.steps} (psnr), then {config.gan.steps} (gan), of {config.batch_size} crops of "
            f"{config.crop_px} px",
            f"best:    the checkpoint by {', '.join(chosen)}",
            f"devices: {workers}; {'one GPU for each worker' if config.use_gpu else 'CPU'}",
        ]
    )


def _tracked_training(
    config: TrainConfig,
    run: Storage,
    manifest: Manifest,
    identity: RunIdentity,
    sets: Sequence[ValidationSet],
    report: Callable[[Mapping[str, float]], None],
    callbacks: Sequence[Any],
    parent_run_id: str | None,
) -> TrainingResult:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    run.write_bytes("config.yaml", text.encode())
    tracked = open_run(
        config.tracking,
        run,
        run_name=config.run_name,
        # The manifest states what the data set was made from; the configuration may name other images by now.
        parameters=flat_fields(
            config.model_dump(mode="json", exclude={"tracking": True, "data": _INGEST_ONLY})
        )
        | {f"data.{name}": value for name, value in manifest.facts().items()}
        | {f"init.{network}_sha256": each.sha256 for network, each in identity.initial.items()},
        tags={"esrgan.key": identity.key, "esrgan.data": manifest.sha256} | initial_tags(identity.initial),
        config_text=text,
        parent_run_id=parent_run_id,
        run_id=identity.tracking_run_id,
    )
    if tracked is not None and identity.tracking_run_id != tracked.run_id:
        IDENTITY.write(run, replace(identity, tracking_run_id=tracked.run_id))
    status, reason = "FAILED", ""
    sender = Sender(run, config.tracking, tracked, published_step=lambda: published_step(run))
    try:
        with sender:
            with saving_on_sigterm(run):
                _train(config, run, sets, report, callbacks)
            left = sender.flush(timeout_s=60.0)
            if left:
                print(
                    f"{left} segments of metrics could not be sent; {send_later(run)}",
                    flush=True,
                )
        if STOP.is_open(run) and not _is_trained(config, run):
            raise Stopped(f"run {config.run_name} stopped at step {published_step(run)}")
        result = conclude(config, run, sender.tracked, text, manifest, sets)
        status = "FINISHED"
        return result
    except (KeyboardInterrupt, SystemExit, Stopped):
        status = "KILLED"
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        # If the tracking server was unreachable at the start, the sender may have opened the run since.
        finish_run(sender.tracked, status, run, reason=reason)


def _train(
    config: TrainConfig,
    run: Storage,
    sets: Sequence[ValidationSet],
    report: Callable[[Mapping[str, float]], None],
    callbacks: Sequence[Any],
) -> None:
    if _is_trained(config, run):
        return
    if config.worker_range[1] == 0:
        device = torch.device("cuda" if config.use_gpu else "cpu")
        worker = Worker(device=device, report=report, stopping=lambda: STOP.is_open(run))
        try:
            train(config, worker, run, feed_of(config, worker), open_sets(config, sets))
        except (Diverged, OutOfMemory) as error:
            raise UserError(str(error)) from None
    else:
        from pipeline.training import ray_trainer

        ray_trainer.fit(config, run, sets, callbacks)


def _is_trained(config: TrainConfig, run: Storage) -> bool:
    """Whether the final checkpoint exists and passes verification."""
    last = config.psnr.steps + config.gan.steps
    if published_step(run) < last:
        return False
    newest = checkpoints.newest(run)
    return newest is not None and newest.name.step >= last


def _require_loadable(config: TrainConfig, run: Storage) -> None:
    """Loads the newest checkpoint into a changed configuration, before it replaces the run's. Raises UserError."""
    newest = checkpoints.newest(run)
    if newest is not None:
        state = new_state(config, newest.name.stage, torch.device("cpu"))
        state.load(newest.ema, newest.tensors, newest.scalars)
