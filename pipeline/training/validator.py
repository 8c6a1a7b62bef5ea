"""Validation within a run: metrics of the EMA weights, the best checkpoints, comparison strips."""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain

from pipeline.errors import UserError
from pipeline.metrics import MetricSet, metric_of
from pipeline.model import RRDBNet
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.checkpoint import CheckpointName
from pipeline.training.config import TrainConfig
from pipeline.training.run_log import RunLog
from pipeline.training.selection import measured_metrics, select_key
from pipeline.training.state import Best, TrainState, Validation
from pipeline.training.validation import bicubic_baseline, comparison_strips, own_batches, validate
from pipeline.training.validation_sets import ValidationSet, all_images, deciding_images
from pipeline.training.worker import Worker


class Validator:
    """Validates the EMA weights on `sets`, on all ranks together; without sets `validate` does nothing.

    Raises:
        UserError: a metric's weights are missing or corrupt, or an image is too small for a metric.
    """

    def __init__(
        self, config: TrainConfig, worker: Worker, run: Storage, sets: Sequence[ValidationSet], log: RunLog
    ) -> None:
        self._config, self._worker, self._run, self._sets, self._log = config, worker, run, sets, log
        chosen = config.validation
        names = measured_metrics(config) if sets else ()
        self._metrics = MetricSet(names, worker.device, config.data.scale, chosen.weights_folder)
        images = [image for each in sets for image in each.images]
        for image in images:
            try:
                self._metrics.require_size(*image.shape)
            except UserError as error:
                raise UserError(f"validation image {image.name}: {error}; see validation.metrics") from None
        for index in chain(*own_batches(images, worker.device)):
            images[index].hr  # noqa: B018 - read now, so that a missing file is found before the first step
        self._images = all_images(sets)
        self._stage_one: list[RRDBNet] | None = None
        """Stage 1's result, shown next to stage 2's; empty if it is unreadable, None if it was not read yet."""

    def validate(self, state: TrainState) -> None:
        """Measures the EMA weights and updates `state.validation` and `state.best`; the first time, also bicubic."""
        if not self._sets:
            return
        scale, device = self._config.data.scale, self._worker.device
        metrics = validate(state.ema, self._sets, self._metrics, self._config.precision == "bf16")
        if state.bicubic_images != self._images or not metrics.keys() <= state.bicubic.keys():
            state.bicubic = bicubic_baseline(self._sets, self._metrics, scale)
            state.bicubic_images = self._images
            self._log.baseline(state, self._sets)
        was_below = self._was_below(state)
        state.validation = Validation(state.step, metrics)
        if state.step:  # Step 0 has no checkpoint that could be the best.
            key = select_key(self._config, state.stage)
            best = Best(state.step, metrics[key], key, deciding_images(self._config, self._sets))
            state.insert_best(best, self._config.keep_best_checkpoints)
        self._log.validation(state, self._sets, metrics)
        if is_below(metrics, state.bicubic) and not was_below:
            self._log.event(
                state.step, f"warning: validation is below bicubic: {comparison(metrics, state.bicubic)}"
            )
        if self._worker.is_main:
            generators = [state.ema] if state.stage == "psnr" else [*self._read_stage_one(state), state.ema]
            self._log.images(state.step, comparison_strips(generators, self._sets, scale, device))

    def begin_stage_two(self, state: TrainState) -> None:
        """Keeps stage 1's result for the strips of stage 2, and logs its metrics next to bicubic's."""
        if self._worker.is_main and self._config.psnr.steps and self._sets:
            self._stage_one = [copy.deepcopy(state.ema)]
        if state.validation is None or state.validation.step != state.step:
            return  # no validation images
        metrics, bicubic = state.validation.metrics, state.bicubic
        warning = "warning: below bicubic: " if is_below(metrics, bicubic) else ""
        self._log.event(
            state.step, f"{warning}stage 2 starts from a generator with {comparison(metrics, bicubic)}"
        )

    def _was_below(self, state: TrainState) -> bool:
        """Whether the validation before was below bicubic, or may have been: one warning for each fall below it."""
        if state.validation is not None:
            return is_below(state.validation.metrics, state.bicubic)
        # Random weights are below it; a stage 2 that begins at step 0 logs the comparison itself.
        return state.step == 0 and (self._config.init.generator is None or self._config.psnr.steps == 0)

    def _read_stage_one(self, state: TrainState) -> list[RRDBNet]:
        """Stage 1's result, from its checkpoint after a resume; empty if there is none or it is unreadable."""
        if not self._config.psnr.steps:
            return []
        if self._stage_one is None:
            name = CheckpointName(self._config.psnr.steps, "psnr")
            try:
                weights = checkpoints.read(self._run, name).ema
            except checkpoints.CorruptCheckpoint as error:
                self._log.event(
                    state.step,
                    f"warning: validation images omit the stage-1 output (checkpoint unreadable): {error}",
                )
                self._stage_one = []
            else:
                generator = copy.deepcopy(state.ema)
                generator.load_state_dict(weights)
                self._stage_one = [generator]
        return self._stage_one


def is_below(metrics: Mapping[str, float], bicubic: Mapping[str, float]) -> bool:
    """Whether PSNR (Y) is worse than bicubic's on a validation set; False where it is not measured."""
    return any(
        value < bicubic[key]
        for key, value in metrics.items()
        if metric_of(key) == "psnr_y" and key in bicubic
    )


def comparison(metrics: Mapping[str, float], bicubic: Mapping[str, float]) -> str:
    """The metrics with bicubic's, in one line; those that bicubic was not measured by are omitted."""
    return ", ".join(
        f"{key} {value:.4f} (bicubic {bicubic[key]:.4f})" for key, value in metrics.items() if key in bicubic
    )
