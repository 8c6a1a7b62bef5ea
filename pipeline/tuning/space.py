"""The search space: its distributions, its checks, and the configuration of a trial."""

import hashlib
import itertools
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from decimal import Decimal
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import optuna
from pydantic import BaseModel

from pipeline.errors import UserError
from pipeline.section import flat_fields, with_fields
from pipeline.training.config import TrainConfig
from pipeline.training.identity import learning_fields
from pipeline.tuning.config import Choice, Range, TuneConfig

Values = dict[str, Any]
"""A trial's searched fields, by dotted name."""
MAX_GRID = 100_000


def distributions(settings: TuneConfig) -> dict[str, optuna.distributions.BaseDistribution]:
    """Optuna's distribution of every searched field."""
    return {name: _distribution(name, span) for name, span in settings.space.items()}


def from_optuna(settings: TuneConfig, parameters: Mapping[str, Any]) -> Values:
    """A trial's values from Optuna's parameters."""
    return {name: _decoded(name, settings.space[name], parameters[name]) for name in settings.space}


def to_optuna(settings: TuneConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's parameters for a trial's values."""
    return {
        name: _encoded(values[name]) if isinstance(span, Choice) else values[name]
        for name, span in settings.space.items()
    }


def grid(settings: TuneConfig) -> list[Values] | None:
    """Every combination of values; None if a range has no step, or there are too many."""
    axes = [axis(name, span) for name, span in settings.space.items()]
    if any(each is None for each in axes) or math.prod(len(each or ()) for each in axes) > MAX_GRID:
        return None
    return [dict(zip(settings.space, combination, strict=True)) for combination in itertools.product(*axes)]  # type: ignore[arg-type]


def points(settings: TuneConfig, base: TrainConfig) -> list[Values]:
    """The values of `tune.points`, completed from the training configuration. Raises UserError."""
    known = {name: _value_at(base, name) for name in settings.space}
    listed: list[Values] = []
    for number, point in enumerate(settings.points):
        where = f"tune.points[{number}]"
        for name in point:
            if name not in settings.space:
                raise UserError(f"{where}: {name} is not a field of tune.space ({', '.join(settings.space)})")
        values = {name: point.get(name, known[name]) for name in settings.space}
        for name, span in settings.space.items():
            found = _member(name, span, values[name])
            if not found:
                raise UserError(
                    f"{where}: {name}={json.dumps(values[name])} is outside tune.space; widen the space"
                )
            values[name] = found[0]
        if values in listed:
            raise UserError(f"{where}: the same values as an earlier point; remove it")
        listed.append(values)
    return listed


def check_space(settings: TuneConfig, base: TrainConfig) -> list[TrainConfig]:
    """Checks every field, and that all values of the space are valid.

    Returns:
        Configurations with the values at both ends of every range and with every choice.

    Raises:
        UserError: one line that names the field.
    """
    for name, span in settings.space.items():
        if isinstance(span, Range) and _field_type(name) is bool:
            raise UserError(f"tune.space: {name}: true or false, not a range; use choice: [true, false]")
        if isinstance(span, Range) and _field_type(name) is int:
            wrong = {"low": span.low, "high": span.high, "step": span.step}
            for part, number in wrong.items():
                if number is not None and number != int(number):
                    raise UserError(
                        f"tune.space: {name}: {part}={number}: {name} is an integer; give a whole number"
                    )
    spans = settings.space.items()
    low = {name: _lowest(name, span) for name, span in spans}
    high = {name: _highest(name, span) for name, span in spans}
    single = [
        low | {name: choice} for name, span in spans if isinstance(span, Choice) for choice in span.choice
    ]
    trials = [trial_config(base, values) for values in [low, high, *single, *points(settings, base)]]
    effective = [_effective_fields(trial) for trial in trials]
    for name, span in spans:
        if not any(f"{key}.".startswith(f"{name}.") for fields in effective for key in fields):
            raise UserError(
                f"tune.space: {name} has no effect on what is trained here, or is the same for all trials; remove it"
            )
        if isinstance(span, Choice) and len({json.dumps(each, sort_keys=True) for each in span.choice}) < len(
            span.choice
        ):
            raise UserError(f"tune.space: {name}: a value is listed twice")
    if settings.search == "grid" and grid(settings) is None:
        raise UserError(
            "tune.search=grid: every range needs a step, and at most 100,000 combinations; or use random"
        )
    return trials


def trial_config(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`base` with a trial's values, validated again. Raises UserError with the field."""
    try:
        return with_fields(base, values)
    except UserError as error:
        raise UserError(f"tune.space: {error}") from None


def is_valid(base: TrainConfig, values: Mapping[str, Any]) -> bool:
    """Whether `base` with these values is a valid configuration."""
    try:
        trial_config(base, values)
    except UserError:
        return False
    return True


def trial_name(values: Mapping[str, Any]) -> str:
    """A trial's run name: a digest of its values."""
    return f"trial-{digest(json.dumps(values, sort_keys=True))}"


def digest(text: str) -> str:
    """The first 10 hexadecimal digits of the text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def shown(value: Any) -> str:
    """A value for a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def shown_metrics(metrics: Mapping[str, float], names: Iterable[str]) -> str:
    """Such as `psnr_y 24.1234, lpips 0.3210`, without those that were not measured."""
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)


def flag_text(value: Any) -> str:
    """A value as a command-line flag takes it, quoted for a shell."""
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))


def _distribution(name: str, span: Range | Choice) -> optuna.distributions.BaseDistribution:
    if isinstance(span, Choice):
        return optuna.distributions.CategoricalDistribution([_encoded(value) for value in span.choice])
    low, high = _lowest(name, span), _highest(name, span)
    if isinstance(low, int):
        return optuna.distributions.IntDistribution(low, high, log=span.log, step=int(span.step or 1))
    return optuna.distributions.FloatDistribution(
        low, high, log=span.log, step=span.step and float(span.step)
    )


def _encoded(value: Any) -> Any:
    """A choice in the form that Optuna stores: its own value, or JSON text of a list or a mapping."""
    return value if isinstance(value, int | float | str | None) else json.dumps(value, sort_keys=True)


def _decoded(name: str, span: Range | Choice, value: Any) -> Any:
    if isinstance(span, Range):
        return value if span.step is None else _stepped(name, span, round((value - span.low) / span.step))
    return next(
        each for each in span.choice if type(_encoded(each)) is type(value) and _encoded(each) == value
    )


def _member(name: str, span: Range | Choice, value: Any) -> list[Any]:
    """The value, in the form that a choice has it (1 is 1.0, but not true); empty if it is outside."""
    if isinstance(span, Choice):
        same = isinstance(value, bool)
        return [each for each in span.choice if each == value and isinstance(each, bool) == same][:1]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [value] if is_number and _distribution(name, span)._contains(value) else []


def axis(name: str, span: Range | Choice) -> list[Any] | None:
    """All values of a field, in order; None if there are infinitely or too many."""
    if isinstance(span, Choice):
        return list(span.choice)
    if span.step is None and _field_type(name) is not int:
        return None
    count = _steps(span) + 1
    return [_stepped(name, span, index) for index in range(count)] if count <= MAX_GRID else None


def _lowest(name: str, span: Range | Choice) -> Any:
    return span.choice[0] if isinstance(span, Choice) else _stepped(name, span, 0)


def _highest(name: str, span: Range | Choice) -> Any:
    """The largest value that is drawn: `high`, or the last step below it; of a choice the last value."""
    if isinstance(span, Choice):
        return span.choice[-1]
    is_continuous = span.step is None and _field_type(name) is not int
    return float(span.high) if is_continuous else _stepped(name, span, _steps(span))


def _steps(span: Range) -> int:
    """Number of steps from the lowest to the highest value."""
    return int((Decimal(str(span.high)) - Decimal(str(span.low))) / Decimal(str(span.step or 1)))


def _stepped(name: str, span: Range, index: int) -> float | int:
    """`low + index * step`, in decimals: 0.1 + 2 * 0.1 is 0.3."""
    value = Decimal(str(span.low)) + index * Decimal(str(span.step or 1))
    return int(value) if _field_type(name) is int else float(value)


def _field_type(name: str) -> Any:
    """The annotation of a field by its dotted name, `int` for `int | None`; None if no such field exists."""
    section: Any = TrainConfig
    for part in name.split("."):
        if not (
            isinstance(section, type) and issubclass(section, BaseModel) and part in section.model_fields
        ):
            return None
        section = section.model_fields[part].annotation
    kinds = [each for each in get_args(section) if each is not NoneType]
    return kinds[0] if get_origin(section) in (Union, UnionType) and len(kinds) == 1 else section


def _value_at(config: TrainConfig, name: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _effective_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields that decide what is learned, by dotted name, without those that this configuration does not use."""
    fields = learning_fields(config)
    unused = ["use_gpu"]  # trials request the devices of the sweep's configuration
    for stage in ("psnr", "gan"):
        if not fields[stage]["steps"]:
            unused += [f"{stage}.{name}" for name in fields[stage] if name != "steps"]
        shape = fields[stage]["schedule"]["shape"]
        unused += [f"{stage}.schedule.milestones"] if shape != "halving" else []
        unused += [
            f"{stage}.schedule.{name}" for name in ("period_steps", "final_share") if shape != "cosine"
        ]
    if not (config.gan.steps and config.gan.perceptual_weight):
        unused.append("perceptual")
    if not (config.gan.steps and config.gan.adversarial_weight):
        unused += ["model.discriminator", "model.discriminator_num_feat", "init.discriminator"]
        unused += ["gan.discriminator_learning_rate", "gan.loss"]
    if not config.gan.pixel_weight:
        unused.append("gan.pixel_loss")
    if config.init.generator or config.init.discriminator:
        fields["init"] = config.init.model_dump(
            mode="json", include={"generator", "discriminator", "partial"}
        )
    return {
        name: value
        for name, value in flat_fields(fields).items()
        if not any(f"{name}.".startswith(f"{each}.") for each in unused)
    }
