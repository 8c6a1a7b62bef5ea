"""The training loop: both stages, from top to bottom. Launcher-agnostic: a plain process, torchrun or Ray Train."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

import torch

from pipeline.data.feed import Feed
from pipeline.errors import UserError
from pipeline.model import set_deterministic, set_precision
from pipeline.storage import Storage
from pipeline.tracking.spool import discard_after
from pipeline.training import checkpoint as checkpoints
from pipeline.training.checkpoint import CheckpointName, Stage
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.checks import perceptual_features
from pipeline.training.config import TrainConfig
from pipeline.training.distributed import gathered
from pipeline.training.faults import Diverged, OutOfMemory
from pipeline.training.initial import load_initial
from pipeline.training.meter import Meter
from pipeline.training.run_log import RunLog
from pipeline.training.schedule import due
from pipeline.training.selection import select_key
from pipeline.training.state import TrainState, begin_gan, new_state, of_metric
from pipeline.training.stepper import Stepper
from pipeline.training.validation_sets import ValidationSet, deciding_images
from pipeline.training.validator import Validator
from pipeline.training.worker import Worker


def train(
    config: TrainConfig, worker: Worker, run: Storage, feed: Feed, sets: Sequence[ValidationSet]
) -> None:
    """Trains from the newest valid checkpoint in `run`, or from the beginning, to the end of both stages.

    All persistent output is written to `run`: checkpoints, each with a segment of records for tracking.

    Args:
        config: equal on all ranks.
        worker: runtime context of this process.
        run: readable by all ranks.
        feed: this rank's share of every step.
        sets: validation images; empty: no validation.

    Raises:
        UserError: no usable checkpoint, missing or corrupt weights, too many corrupt patches, or a storage that cannot
            be written; the message names the field to change.
        Diverged: gradients stay non-finite.
        OutOfMemory: the GPU has too little memory.
    """
    try:
        _train(config, worker, run, feed, sets)
    except torch.OutOfMemoryError as error:
        text = ". ".join(str(error).split(". ")[:2])  # details of the allocator follow
        advice = "" if config.precision == "bf16" else ", or use precision=bf16"
        raise OutOfMemory(
            f"batch_size={config.batch_size}, crop_px={config.crop_px}: {text.rstrip('.')}; lower one of them{advice}"
        ) from None


def _train(
    config: TrainConfig, worker: Worker, run: Storage, feed: Feed, sets: Sequence[ValidationSet]
) -> None:
    set_precision(config.precision)
    set_deterministic(config.deterministic)
    state = _resume_or_begin(config, worker, run, sets)
    if worker.is_main:
        discard_after(run, state.step)
    last = config.psnr.steps + config.gan.steps
    log = RunLog(config, worker, run)
    log.started(state)
    if state.step == 0:
        log.initialized(state, load_initial("generator", state, config, run))
    validator = Validator(config, worker, run, sets, log)
    # Loaded at the start and not after stage 1, so that a node without the weights is found at once.
    features = perceptual_features(config)
    if features is not None:
        features.to(worker.device)
        if config.channels_last:
            features.to(memory_format=torch.channels_last)
    stepper = Stepper(config, worker, features)

    with ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(config, run, state, log)) if worker.is_main else None
        batches = stack.enter_context(closing(feed.batches(state.step, last, worker.device.type == "cuda")))
        if state.step == 0:
            validator.validate(state)
        # Created last: the first interval's rates exclude the time of loading and of the validation at step 0.
        meter = Meter(config.batch_size, worker.device)
        while state.step < last:
            if state.stage == "psnr" and state.step >= config.psnr.steps:
                begin_gan(state, config, worker.device)
                log.initialized(state, load_initial("discriminator", state, config, run))
                validator.begin_stage_two(state)

            fetch_began = time.perf_counter()
            raw = next(batches)
            wait_s = time.perf_counter() - fetch_began

            losses, rate = stepper(state, raw)
            state.step += 1
            meter.add(losses, wait_s, raw.corrupt)

            now = due(config, state.step)
            save, resize, stop = now.save, False, False
            if now.log:
                values, stop = meter.finish(worker.stopping())
                _require_healthy(config, state, values)
                log.interval(state, {**values, "learning_rate": rate})
                save = save or stop or worker.preempted()
                # Only rank 0 writes, so only rank 0 is asked.
                resize = worker.is_main and not stop and worker.resizing()
            if now.validate:
                with meter.paused():
                    validator.validate(state)
            if save or resize:
                if checkpointer is not None:
                    checkpointer.save(last=stop or state.step == last)
                # Only what was measured at this step: the report must not depend on memory that a restart loses.
                if state.validation is not None and state.validation.step == state.step:
                    worker.report({"step": float(state.step), **state.validation.metrics})
                if resize and checkpointer is not None and checkpointer.written():
                    worker.ready_to_resize()
            if stop:
                break
        if checkpointer is not None:
            checkpointer.finish()


def _resume_or_begin(
    config: TrainConfig, worker: Worker, run: Storage, sets: Sequence[ValidationSet]
) -> TrainState:
    """The state of the newest valid checkpoint, the same on all ranks; else a new one."""
    # All ranks read at the same time: none waits for another's download in a collective.
    checkpoint = checkpoints.newest(run) if worker.is_main else checkpoints.newest_if_valid(run)
    name = CheckpointName.parse(gathered(str(checkpoint.name) if checkpoint else "")[0])  # rank 0's
    stage: Stage = name.stage if name else "psnr"
    state = new_state(config, stage, worker.device)
    if name is not None:
        if checkpoint is None or checkpoint.name != name:
            try:
                checkpoint = checkpoints.read(run, name)
            except checkpoints.CorruptCheckpoint as error:
                raise UserError(
                    f"storage={config.storage}: rank {worker.rank} cannot read a checkpoint that rank 0 can read "
                    f"({error}); storage must be shared by all nodes"
                ) from None
        state.load(checkpoint.ema, checkpoint.tensors, checkpoint.scalars)
        state.best = of_metric(state.best, select_key(config, stage), deciding_images(config, sets))
    return state


def _require_healthy(config: TrainConfig, state: TrainState, values: dict[str, float]) -> None:
    """Raises Diverged or UserError if the run must end; all ranks decide identically."""
    consecutive, total = (int(count) for count in state.skipped.tolist())
    values["skipped_steps"] = total
    if consecutive > config.faults.max_skipped_steps:
        raise Diverged(
            f"step {state.step}: {consecutive} consecutive steps had non-finite gradients "
            f"(faults.max_skipped_steps={config.faults.max_skipped_steps}); lower {state.stage}.learning_rate"
            + (" or use precision=fp32" if config.precision == "bf16" else "")
        )
    state.corrupt_patches += int(values["corrupt_patches"])
    share = state.corrupt_patches / (state.step * config.batch_size)
    if share > config.data.max_corrupt_share:
        raise UserError(
            f"step {state.step}: {state.corrupt_patches} corrupt patches so far, a share of {share:.2%} "
            f"(data.max_corrupt_share={config.data.max_corrupt_share}); check with prepare_data.py --verify"
        )
