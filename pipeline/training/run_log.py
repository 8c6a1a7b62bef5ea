"""The run's log: lines on the console, and records that are spooled for MLflow with the next checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.imaging import Image
from pipeline.metrics import metric_of
from pipeline.model.device import emulates_bf16
from pipeline.storage import Storage
from pipeline.tracking.spool import Event, ImageRecord, Metrics, Record, now_ms, validations
from pipeline.tracking.system_metrics import system_metrics
from pipeline.training.advice import Advisor
from pipeline.training.config import TrainConfig
from pipeline.training.meter import progress_line
from pipeline.training.perception_distortion import KEY, axes_of, perception_distortion_figure
from pipeline.training.state import TrainState
from pipeline.training.validation_config import HELD_OUT
from pipeline.training.validation_sets import ValidationSet
from pipeline.training.worker import Worker


@dataclass
class RunLog:
    """Prints and collects records in the main process; does nothing on other ranks."""

    config: TrainConfig
    worker: Worker
    run: Storage
    _records: list[Record] = field(default_factory=list)
    _advisor: Advisor = field(default_factory=Advisor)
    _skipped_steps: float = 0.0
    """Total up to the last interval."""
    _validations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics of all validations by step, those of earlier attempts too; in the main process."""

    def started(self, state: TrainState) -> None:
        """Logs the step at which a run resumes, why the worker group was restarted, and an unsuitable precision."""
        self._skipped_steps = float(state.skipped[1])
        if state.step and self.worker.is_main:
            self._validations = validations(self.run)
        if state.step or self.worker.reason:
            workers = self.worker.world_size
            plural = "s" if workers > 1 else ""
            reason = f" {self.worker.reason}" if self.worker.reason else ""
            self.event(
                state.step,
                f"resuming at step {state.step} ({state.stage} stage, {workers} worker{plural}){reason}",
            )
        if self.config.precision == "bf16" and emulates_bf16(self.worker.device):
            self.event(state.step, "warning: precision=bf16: this device emulates bfloat16 (slow); use fp32")

    def initialized(self, state: TrainState, text: str) -> None:
        """Logs which given weights a network starts from; an empty `text` is not logged."""
        if text:
            self.event(state.step, f"initialized {text}")

    def interval(self, state: TrainState, values: Mapping[str, float]) -> None:
        """Logs an interval: means, rates, warnings; `values` of `Meter.finish`, `skipped_steps`, `learning_rate`."""
        if not self.worker.is_main:
            return
        print(progress_line(self.config, state.stage, state.step, values), flush=True)
        for warning in self._advisor.update(values):
            self.event(state.step, f"warning: {warning}")
        skipped = values["skipped_steps"] - self._skipped_steps
        if skipped:
            self.event(state.step, f"warning: skipped {skipped:.0f} optimizer steps (non-finite gradients)")
        self._skipped_steps = values["skipped_steps"]
        if values["corrupt_patches"]:
            self.event(state.step, f"warning: replaced {values['corrupt_patches']:.0f} corrupt patches")
        named = {_metric_name(name): value for name, value in values.items()}
        self._metrics(state.step, named | system_metrics(self.run.nearest_folder()))

    def baseline(self, state: TrainState, sets: Sequence[ValidationSet]) -> None:
        """Logs the metrics of bicubic upscaling."""
        if self.worker.is_main:
            _print_means(f"[{state.stage}] step {state.step} bicubic", sets, state.bicubic)
            self._metrics(state.step, {f"bicubic/{name}": mean for name, mean in state.bicubic.items()})

    def validation(
        self, state: TrainState, sets: Sequence[ValidationSet], metrics: Mapping[str, float]
    ) -> None:
        """Logs the metrics of a validation."""
        if self.worker.is_main:
            _print_means(f"[{state.stage}] step {state.step} validation", sets, metrics)
            self._metrics(state.step, {f"validation/{name}": mean for name, mean in metrics.items()})
            self._validations[state.step] = dict(metrics)
            axes = axes_of(self.config)
            if state.stage == "gan" and axes is not None:
                best = state.best[0].step if state.best else None
                figure = perception_distortion_figure(
                    self._validations, axes, self.config.psnr.steps, best, state.bicubic
                )
                self._records.append(ImageRecord(state.step, now_ms(), KEY, figure))

    def images(self, step: int, images: Mapping[str, Image]) -> None:
        """Records validation images."""
        self._records += [
            ImageRecord(step, now_ms(), f"validation/{name}", image) for name, image in images.items()
        ]

    def event(self, step: int, text: str) -> None:
        """Prints and records one line."""
        if self.worker.is_main:
            print(text, flush=True)
            self._records.append(Event(step, now_ms(), text))

    def take(self) -> list[Record]:
        """The records since the last call."""
        records, self._records = self._records, []
        return records

    def put_back(self, records: list[Record]) -> None:
        """Returns records that could not be written; they come first in the next `take`."""
        self._records = records + self._records

    def _metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._records.append(Metrics(step, now_ms(), dict(values)))


def _print_means(what: str, sets: Sequence[ValidationSet], metrics: Mapping[str, float]) -> None:
    """Prints metrics, a line for each set."""
    for each in sets:
        means = ", ".join(
            f"{metric_of(key)} {mean:.4f}" for key, mean in metrics.items() if each.key(metric_of(key)) == key
        )
        named = "" if each.name == HELD_OUT else f" on {each.name}"
        print(f"{what}{named} ({len(each.images)} images): {means}", flush=True)


def _metric_name(name: str) -> str:
    """loss_pixel -> loss/pixel; others below train/."""
    return f"loss/{name.removeprefix('loss_')}" if name.startswith("loss_") else f"train/{name}"
