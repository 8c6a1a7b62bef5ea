"""Configuration schema of a sweep."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from pipeline.errors import UserError
from pipeline.metrics.names import METRICS, metric_of
from pipeline.section import Section, validated
from pipeline.tuning.constraint import Constraint

Number = int | float


class Range(Section):
    """Numbers between two bounds; whole numbers for an integer field."""

    low: Number = Field(description="Smallest value.")
    high: Number = Field(description="Largest value.")
    log: bool = Field(False, description="Sample on a logarithmic scale.")
    step: Number | None = Field(None, gt=0, description="Only low, low + step, ... up to high.")

    @model_validator(mode="after")
    def _bounds(self) -> "Range":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low}, high={self.high}: need low < high, and low > 0 with log")
        if self.log and self.step is not None:
            raise ValueError(
                f"log=true, step={self.step}: a logarithmic scale has no step; remove one of them"
            )
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step={self.step}: larger than high - low; lower it")
        return self


class Choice(Section):
    """One of a list of values."""

    choice: tuple[JsonValue, ...] = Field(min_length=1, description="The values to choose from.")


class TuneConfig(Section):
    """Ray Tune: search space, objectives, search algorithm and early stopping."""

    name: str = Field(
        "tune",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the sweep and of its folder in `storage`; the same name again resumes it.",
    )
    trials: int = Field(8, ge=1, description="Number of trials, without repetitions; may be raised later.")
    max_concurrent: int = Field(1, ge=1, description="Maximum number of concurrent trials.")
    max_hours: float | None = Field(
        None,
        gt=0,
        description="Hours after which running trials save a checkpoint and stop; the same command resumes them.",
    )
    space: dict[str, Range | Choice] = Field(
        {
            "gan.pixel_weight": Range(low=1e-3, high=1.0, log=True),
            "gan.perceptual_weight": Range(low=0.1, high=10.0, log=True),
            "gan.adversarial_weight": Range(low=1e-4, high=5e-2, log=True),
            "model.residual_scale": Choice(choice=(0.1, 0.2, 0.4)),
        },
        min_length=1,
        description="Search space: fields of the training configuration, by dotted name.",
    )
    points: tuple[dict[str, JsonValue], ...] = Field(
        (),
        description="Values of the first trials; a field that is not given has the value of the training "
        "configuration, so {} is that configuration itself.",
    )
    metrics: tuple[str, ...] = Field(
        ("psnr_y",),
        min_length=1,
        description="Validation metrics to optimize. With several, the result is the Pareto front.",
    )
    modes: tuple[Literal["max", "min"], ...] = Field(
        (),
        description="max or min for each of tune.metrics; default: the direction in which the metric is better.",
    )
    value: Literal["last", "best", "mean"] = Field(
        "last",
        description="Value of a trial: its last validation, that of its best checkpoint (the one that would be "
        "registered), or the mean of its last validations; always of the EMA weights.",
    )
    mean_validations: int = Field(3, ge=1, description="tune.value=mean: number of last validations.")
    constraints: tuple[str, ...] = Field(
        (), description="Conditions that a trial must meet to be the best, such as `psnr_y >= 24.5`."
    )
    search: Literal["random", "grid", "tpe"] = Field(
        "random",
        description="random; grid: every combination of choices and steps; tpe: Optuna's TPE, for one or more metrics.",
    )
    repeats: int = Field(
        0,
        ge=0,
        description="Repeat the best trials with this number of other seeds, to compare differences with the noise.",
    )
    repeat_top: int = Field(3, ge=1, description="Number of best trials to repeat.")
    scheduler: Literal["none", "asha"] = Field(
        "none", description="asha: stop weak trials early (asynchronous successive halving)."
    )
    grace_steps: int = Field(
        1, ge=1, description="asha: the first rung, in steps of stage 2; the next ones are multiples."
    )
    reduction_factor: int = Field(
        3, ge=2, description="asha: 1/N of the trials survive each rung; the next rung is N times as long."
    )

    @field_validator("space", mode="before")
    @classmethod
    def _spans(cls, space: object) -> object:
        """Validates each field's values as what they are meant to be: the errors of a union concern all its members."""
        return (
            {name: _span(name, value) for name, value in space.items()}
            if isinstance(space, Mapping)
            else space
        )

    @model_validator(mode="after")
    def _fits(self) -> "TuneConfig":
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics={list(self.metrics)}: a metric is listed twice")
        if self.modes and len(self.modes) != len(self.metrics):
            raise ValueError(
                f"modes={list(self.modes)}: give one for each of {len(self.metrics)} metrics, or none"
            )
        for metric, mode in zip(self.metrics, self.modes, strict=False):
            if metric_of(metric) in METRICS and mode != mode_of(metric):
                better = "larger" if mode == "min" else "smaller"
                raise ValueError(f"modes: {metric} is better when {better}; use {mode_of(metric)}")
        for text in self.constraints:
            Constraint.parse(text)
        if self.scheduler == "asha" and len(self.metrics) > 1:
            raise ValueError("scheduler=asha: stops trials by one metric; use scheduler=none with several")
        return self


def _span(name: str, value: object) -> Range | Choice:
    """Raises ValueError with the searched field."""
    if isinstance(value, Range | Choice):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r}: give {{low: A, high: B}} or {{choice: [A, B]}}")
    try:
        return validated(Choice, value) if "choice" in value else validated(Range, value)
    except UserError as error:
        raise ValueError(f"{name}: {error}") from None


def mode_of(metric: str) -> Literal["max", "min"]:
    """The direction in which a metric is better. Raises KeyError: unknown."""
    return "max" if METRICS[metric_of(metric)].higher_is_better else "min"
