"""The search space: its distributions, and the configuration of a trial."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import optuna

from pipeline.errors import UserError
from pipeline.section import with_fields
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import Choice, TuneConfig, Uniform

Values = dict[str, float | str]
"""A trial's searched fields, by dotted name."""


def distributions(settings: TuneConfig) -> dict[str, optuna.distributions.BaseDistribution]:
    """Optuna's distribution of every searched field."""
    return {
        name: optuna.distributions.FloatDistribution(span.low, span.high, log=span.log)
        if isinstance(span, Uniform)
        else optuna.distributions.CategoricalDistribution(span.choice)
        for name, span in settings.space.items()
    }


def extremes(settings: TuneConfig) -> list[Values]:
    """Values at both ends of every range, and every choice: if these are valid, all values of the space are."""
    spans = settings.space.items()
    low = {name: span.low if isinstance(span, Uniform) else span.choice[0] for name, span in spans}
    high = {name: span.high if isinstance(span, Uniform) else span.choice[-1] for name, span in spans}
    single = [{name: choice} for name, span in spans if isinstance(span, Choice) for choice in span.choice]
    return [low, high, *single]


def trial_config(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`base` with a trial's values, validated again. Raises UserError with the field."""
    try:
        return with_fields(base, values)
    except UserError as error:
        raise UserError(f"tune.space: {error}") from None


def trial_name(values: Mapping[str, Any]) -> str:
    """A trial's run name: a digest of its values."""
    return f"trial-{digest(json.dumps(values, sort_keys=True))}"


def digest(text: str) -> str:
    """The first 10 hexadecimal digits of the text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]
