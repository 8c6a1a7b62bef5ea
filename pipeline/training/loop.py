"""The training loop: both stages, from top to bottom. It does not know who started it."""

import copy
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist

from pipeline.data import HeldOutPhoto
from pipeline.data.feed import Feed
from pipeline.errors import UserError
from pipeline.model import RRDBNet, set_precision
from pipeline.model.weights import sizes_as_text
from pipeline.storage import Storage
from pipeline.tracking.records import Event, Metrics, Picture, discard_after, write_segment
from pipeline.tracking.system import system_metrics
from pipeline.training import checkpoint as checkpoints
from pipeline.training.advice import Advisor
from pipeline.training.batches import on_device
from pipeline.training.checkpoint import Checkpointer, CheckpointName
from pipeline.training.checks import perceptual_features
from pipeline.training.config import TrainConfig
from pipeline.training.distributed import world_size
from pipeline.training.faults import Diverged
from pipeline.training.meter import Meter, progress_line
from pipeline.training.schedule import learning_rate
from pipeline.training.state import Best, Stage, TrainState, Validation, begin_gan, by_metric, new_state
from pipeline.training.step import GanWeights, StepSettings, gan_step, psnr_step
from pipeline.training.validation import PICTURES, pictures, validate
from pipeline.training.worker import Worker

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig, worker: Worker, run: Storage, feed: Feed, held_out: Sequence[HeldOutPhoto]
) -> None:
    """Trains from the newest checkpoint in `run`, or from the beginning, to the end of both stages.

    Everything that lasts goes into `run`: checkpoints, and a segment of records for tracking before each of them.

    Args:
        config: the validated configuration; equal on every worker.
        worker: this process's place in the group.
        run: the run's folder, which every worker can read.
        feed: this worker's share of every step.
        held_out: photographs for validation; none: no validation.

    Raises:
        UserError: no usable checkpoint, weights that are missing, too much damaged data, or a storage that takes no
            checkpoints; the message names the field to change.
        Diverged: gradients stay non-finite.
    """
    device = worker.device
    set_precision(config.precision)
    state = _resume_or_begin(config, worker, run)
    if worker.leads:
        discard_after(run, state.step)
    last = config.psnr.steps + config.gan.steps
    recorder = _Recorder(config, worker, run, state, held_out)
    if state.step or worker.reason:
        recorder.resumed()
    meter = Meter(config.batch_size, device)
    # At the start and not after stage 1: a node that lacks the weights is found at once.
    features = perceptual_features(config)
    if features is not None:
        features.to(device)

    with ExitStack() as stack:
        checkpointer = stack.enter_context(recorder.checkpointer()) if worker.leads else None
        batches = stack.enter_context(closing(feed.batches(state.step, last)))
        if state.step == 0:
            recorder.validate()
        while state.step < last:
            if state.stage == "psnr" and state.step >= config.psnr.steps:
                recorder.stage_one_ends()
                begin_gan(state, config, device)

            asked = time.perf_counter()
            raw = next(batches)
            batch = on_device(raw, config, worker, state.step)
            waited_s = time.perf_counter() - asked

            if state.stage == "psnr":
                losses = psnr_step(state, batch, _settings(config, state))
            else:
                weights = GanWeights(
                    config.gan.pixel_weight, config.gan.perceptual_weight, config.gan.adversarial_weight
                )
                losses = gan_step(
                    state, batch, features, config.perceptual.layers, weights, _settings(config, state)
                )
            state.step += 1
            meter.add(losses, waited_s, raw.damaged)

            stage_ends = state.step in (config.psnr.steps, last)
            validates = stage_ends or state.step % config.validate_every_steps == 0
            saves = validates or state.step % config.checkpoint_every_steps == 0
            resizes = False
            # A checkpoint ends an interval, so that a resumed run continues with whole intervals.
            if saves or state.step % config.log_every_steps == 0:
                values, stops = meter.finish(worker.stopping())
                _require_healthy(config, state, values)
                recorder.interval(values)
                saves = saves or stops or worker.preempted()
                # Only rank 0 writes, so the others need not know.
                resizes = worker.leads and not stops and worker.resizing()
            if validates:
                began = time.perf_counter()
                recorder.validate()
                meter.pause(time.perf_counter() - began)
            if saves or resizes:
                if checkpointer is not None:
                    recorder.save(checkpointer)
                # Only what was measured at this step: the report must not depend on what a restart forgets.
                if state.validation is not None and state.validation.step == state.step:
                    worker.report({"step": float(state.step), **state.validation.metrics})
                if resizes and checkpointer is not None and recorder.saved(checkpointer):
                    worker.ready_to_resize()
                if stops:
                    break
        if checkpointer is not None:
            recorder.finish_saving(checkpointer)


def _resume_or_begin(config: TrainConfig, worker: Worker, run: Storage) -> TrainState:
    """The newest sound checkpoint's state, the same on all workers; else a new one."""
    chosen = checkpoints.newest(run) if worker.leads else None
    name = chosen.name if chosen else None
    if world_size() > 1:
        code = torch.tensor([name.step, name.stage == "gan"] if name else [-1, 0], device=worker.device)
        dist.broadcast(code, 0)
        step, is_gan = code.tolist()
        name = CheckpointName(step, "gan" if is_gan else "psnr") if step >= 0 else None
    stage: Stage = "gan" if name and name.stage == "gan" else "psnr"
    state = new_state(config, stage, worker.device)
    if name is not None:
        if chosen is None:
            try:
                chosen = checkpoints.read(run, name)
            except checkpoints.DamagedCheckpoint as error:
                raise UserError(
                    f"storage={config.storage}: worker {worker.rank} cannot read what worker 0 reads ({error}); "
                    "storage must be shared by all nodes"
                ) from None
        state.load(chosen.ema, chosen.tensors, chosen.scalars)
        state.best = by_metric(state.best, config.tracking.metric)
    return state


def _settings(config: TrainConfig, state: TrainState) -> StepSettings:
    if state.stage == "psnr":
        rate = learning_rate(config.psnr.schedule, config.psnr.learning_rate, state.step, config.psnr.steps)
    else:
        step = state.step - config.psnr.steps
        rate = learning_rate(config.gan.schedule, config.gan.learning_rate, step, config.gan.steps)
    return StepSettings(rate, config.ema_decay, config.precision, config.adam.clip_norm)


def _require_healthy(config: TrainConfig, state: TrainState, values: dict[str, float]) -> None:
    """Ends a run that has gone wrong; every worker comes to the same verdict. Raises Diverged or UserError."""
    in_a_row, altogether = (int(count) for count in state.skipped.tolist())
    values["skipped_steps"] = altogether
    if in_a_row > config.faults.max_skipped_steps:
        raise Diverged(
            f"step {state.step}: {in_a_row} steps in a row had non-finite gradients "
            f"(faults.max_skipped_steps={config.faults.max_skipped_steps}); lower {state.stage}.learning_rate"
            + (" or use precision=fp32" if config.precision == "bf16" else "")
        )
    state.damaged += int(values["damaged_patches"])
    share = state.damaged / (state.step * config.batch_size)
    if share > config.data.max_damaged_share:
        raise UserError(
            f"step {state.step}: {state.damaged} damaged patches so far, a share of {share:.2%} "
            f"(data.max_damaged_share={config.data.max_damaged_share}); check with prepare_data.py --verify"
        )


@dataclass
class _Recorder:
    """Turns what happens into lines for people, records for tracking, and checkpoints."""

    config: TrainConfig
    worker: Worker
    run: Storage
    state: TrainState
    held_out: Sequence[HeldOutPhoto]
    _records: list[Metrics | Picture | Event] = field(default_factory=list)
    _handed_over: list[Metrics | Picture | Event] = field(default_factory=list)
    """Records that the checkpointer has, until it has written them."""
    _failed_saves: int = 0
    _advisor: Advisor = field(default_factory=Advisor)
    _skipped: float = 0.0
    """Steps left out up to the last interval."""

    def resumed(self) -> None:
        """Takes up the thread: says where training goes on, and why it had stopped."""
        if not self.worker.leads:
            return
        state, workers = self.state, self.worker.world_size
        self._skipped = float(state.skipped[1])
        why = f" {self.worker.reason}" if self.worker.reason else ""
        self._event(f"going on at step {state.step} of stage {state.stage} with {workers} workers{why}")

    def stage_one_ends(self) -> None:
        """Keeps stage 1's result for the pictures of stage 2."""
        if self.worker.leads and self.config.psnr.steps and self.held_out:
            self._stage_one = copy.deepcopy(self.state.ema)

    def interval(self, values: dict[str, float]) -> None:
        """Prints and records an interval's means and rates."""
        if not self.worker.leads:
            return
        config, state = self.config, self.state
        last = config.psnr.steps + config.gan.steps
        print(progress_line(state.stage, state.step, last, values), flush=True)
        for warning in self._advisor.look(values):
            self._event(f"warning: {warning}")
        skipped = values["skipped_steps"] - self._skipped
        if skipped:
            self._event(f"warning: left out for gradients that were not finite: {skipped:.0f} steps")
        self._skipped = values["skipped_steps"]
        if values["damaged_patches"]:
            self._event(f"{values['damaged_patches']:.0f} damaged patches were left out")
        values["learning_rate"] = _settings(config, state).learning_rate
        named = {
            name if name.startswith("loss_") else f"train/{name}": value for name, value in values.items()
        }
        named = {name.replace("loss_", "loss/"): value for name, value in named.items()}
        named |= system_metrics(self.run.nearest_folder())
        self._records.append(Metrics(state.step, _now_ms(), named))

    def validate(self) -> None:
        """Validates the EMA weights; every worker takes part."""
        if not self.held_out:
            return
        state, scale = self.state, self.config.data.scale
        metrics = validate(state.ema, self.held_out, scale, self.worker.device)
        state.validation = Validation(state.step, metrics)
        value = metrics[self.config.tracking.metric]
        # Before the first step nothing is saved that could be the best.
        if state.step:
            state.rank(
                Best(state.step, value, self.config.tracking.metric), self.config.keep_best_checkpoints
            )
        if not self.worker.leads:
            return
        means = ", ".join(f"{name} {mean:.4f}" for name, mean in metrics.items())
        print(
            f"[{state.stage}] step {state.step} validation ({len(self.held_out)} photographs): {means}",
            flush=True,
        )
        self._records.append(
            Metrics(state.step, _now_ms(), {f"validation/{name}": mean for name, mean in metrics.items()})
        )
        before = self._stage_one if state.stage == "gan" else None
        shown = [state.ema] if before is None else [before, state.ema]
        for name, strip in pictures(shown, self.held_out[:PICTURES], scale, self.worker.device).items():
            self._records.append(Picture(state.step, _now_ms(), f"validation/{name}", strip))

    def checkpointer(self) -> Checkpointer:
        """Where checkpoints go, with the generator's architecture in their metadata."""
        metadata = sizes_as_text(self.state.ema)
        return Checkpointer(self.run, self.config.keep_checkpoints, metadata, self.state.step)

    def save(self, checkpointer: Checkpointer) -> None:
        """Hands the state and the records since the last checkpoint to the checkpointer's thread.

        A storage that refuses, a full disk for instance, is tried again at the next checkpoint, with all records.

        Raises:
            UserError: it has refused too often.
        """
        state = self.state
        self._written(checkpointer, faults=self.config.faults.max_failed_saves)
        records, self._records = self._records, []
        self._handed_over = records
        name = CheckpointName(state.step, state.stage)
        keep = {self.config.psnr.steps} | {best.step for best in state.best}
        checkpointer.save(
            name,
            state.ema.state_dict(),
            state.tensors(),
            state.scalars(),
            before=lambda: write_segment(self.run, name.step, records),
            keep=frozenset(keep),
        )

    def saved(self, checkpointer: Checkpointer) -> bool:
        """Waits for the write under way and returns whether it succeeded. Raises UserError, as `save` does."""
        return self._written(checkpointer, faults=self.config.faults.max_failed_saves)

    def finish_saving(self, checkpointer: Checkpointer) -> None:
        """Waits for the last checkpoint. Raises UserError when it could not be written."""
        self._written(checkpointer, faults=0)

    def _written(self, checkpointer: Checkpointer, faults: int) -> bool:
        """Waits for the write under way; up to `faults` consecutive failures are only logged.

        Returns:
            Whether it succeeded.

        Raises:
            UserError: one failure more.
            Diverged: the weights are not finite.
        """
        try:
            checkpointer.wait()
            self._failed_saves = 0
        except FloatingPointError as error:
            raise Diverged(f"{error}; lower {self.state.stage}.learning_rate") from None
        except OSError as error:
            self._failed_saves += 1
            # Points that were written before it failed are the same points again, which tracking keeps once.
            self._records = self._handed_over + self._records
            text = f"storage={self.config.storage}: a checkpoint could not be written ({error.strerror or error})"
            if self._failed_saves > faults:
                raise UserError(f"{text}; free some space and start the same run again") from None
            self._event(f"warning: {text}; trying again at the next one")
        self._handed_over = []
        return self._failed_saves == 0

    def _event(self, text: str) -> None:
        print(text, flush=True)
        self._records.append(Event(self.state.step, _now_ms(), text))

    @cached_property
    def _stage_one(self) -> RRDBNet | None:
        """What stage 2 started from, for its pictures; none where there was no stage 1, or it cannot be read."""
        if not self.config.psnr.steps:
            return None
        try:
            weights = checkpoints.read(self.run, CheckpointName(self.config.psnr.steps, "psnr")).ema
        except checkpoints.DamagedCheckpoint as error:
            self._event(f"warning: pictures go without the result of stage 1, which cannot be read: {error}")
            return None
        network = copy.deepcopy(self.state.ema)
        network.load_state_dict(weights)
        return network


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
