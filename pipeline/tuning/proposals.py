"""Values for the next trial, from Optuna.

A study is built from the trials' files for every proposal. So a resumed sweep proposes what an undisturbed one would,
and `study.db`, the copy for optuna-dashboard, can be removed at any time.
"""

import logging
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.run_folder import TrialOutcome, TrialPlan
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import TuneConfig, mode_of
from pipeline.tuning.constraint import Constraint
from pipeline.tuning.space import (
    Values,
    distributions,
    from_optuna,
    grid,
    is_valid,
    points,
    to_optuna,
    trial_name,
)

Validations = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Metrics by step of the compared stage, by name of the trial."""
# Invalid and repeated proposals are drawn again; then the first value that is left in a finite space is used.
DRAWS = 50
_STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


def number_of_trials(settings: TuneConfig) -> int:
    """`tune.trials`, or the number of different values if that is smaller."""
    every = grid(settings)
    return settings.trials if every is None else min(settings.trials, len(every))


def propose(
    settings: TuneConfig,
    base: TrainConfig,
    plans: Sequence[TrialPlan],
    outcomes: Mapping[str, TrialOutcome],
    validations: Validations,
) -> Values | None:
    """Valid values that differ from those of all earlier trials; None if there are none left.

    Args:
        plans: the earlier trials, without repetitions.
        outcomes: of the ended ones, by name.
        validations: of all of them.
    """
    earlier = [plan.values for plan in plans]
    chosen = [values for values in points(settings, base) if values not in earlier]
    every = grid(settings)
    if settings.search == "grid":
        chosen += every or []

    def is_new(values: Values) -> bool:
        return values not in earlier and is_valid(base, values)

    if found := next(filter(is_new, chosen), None):
        return found
    built = study(settings, plans, outcomes, validations)
    for draw in range(DRAWS):
        built.sampler = _sampler(settings, base.seed, len(plans), draw)
        values = from_optuna(settings, built.ask(distributions(settings)).params)
        if is_new(values):
            return values
    return next(filter(is_new, every or []), None)


def study(
    settings: TuneConfig,
    plans: Sequence[TrialPlan],
    outcomes: Mapping[str, TrialOutcome],
    validations: Validations,
) -> optuna.Study:
    """The trials as a study in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions: list[Literal["maximize", "minimize"]] = [
        "maximize" if mode_of(name) == "max" else "minimize" for name in settings.metrics
    ]
    built = optuna.create_study(study_name=settings.name, directions=directions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        built.set_metric_names(list(settings.metrics))
    for plan in plans:
        with suppress(ValueError):  # a plan of an earlier version, with values outside the space
            name = trial_name(plan.values)
            built.add_trial(_frozen(settings, plan, outcomes.get(name), validations.get(name, {})))
    return built


def as_database(built: optuna.Study) -> bytes:
    """The study as an SQLite file."""
    with tempfile.TemporaryDirectory(prefix="esrgan-study-") as folder:
        file = Path(folder) / "study.db"
        file.write_bytes(_empty_database())
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{file}", skip_compatibility_check=True, skip_table_creation=True
        )
        try:
            optuna.copy_study(
                from_study_name=built.study_name, from_storage=built._storage, to_storage=storage
            )
        finally:
            storage.engine.dispose()
        return file.read_bytes()


@lru_cache(maxsize=1)
def _empty_database() -> bytes:
    """A database with Optuna's tables, whose creation takes longer than that of a study."""
    with tempfile.TemporaryDirectory(prefix="esrgan-study-") as folder:
        logging.getLogger("alembic").setLevel(logging.WARNING)
        optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db").engine.dispose()
        return Path(folder, "study.db").read_bytes()


def _frozen(
    settings: TuneConfig,
    plan: TrialPlan,
    outcome: TrialOutcome | None,
    validations: Mapping[int, Mapping[str, float]],
) -> FrozenTrial:
    state = _STATES[outcome.status] if outcome else TrialState.RUNNING
    metrics = outcome.metrics if outcome else {}
    values = [metrics.get(name, math.nan) for name in settings.metrics]
    if state == TrialState.COMPLETE and not all(map(math.isfinite, values)):
        state = TrialState.FAIL
    constraints = {
        str(each): each.violation(metrics)
        for each in map(Constraint.parse, settings.constraints)
        if math.isfinite(metrics.get(each.metric, math.nan))
    }
    curve = {
        step: at[settings.metrics[0]]
        for step, at in validations.items()
        if len(settings.metrics) == 1 and math.isfinite(at.get(settings.metrics[0], math.nan))
    }
    return optuna.trial.create_trial(
        state=state,
        values=values if state == TrialState.COMPLETE else None,
        params=to_optuna(settings, plan.values),
        distributions=distributions(settings),
        user_attrs={"reason": outcome.reason} if outcome and outcome.reason else {},
        intermediate_values=curve,
        constraints=constraints,
    )


def _sampler(settings: TuneConfig, seed: int, number: int, draw: int) -> optuna.samplers.BaseSampler:
    # Optuna's seeds have 32 bits. Each proposal has its own, so that it does not depend on how many were drawn before.
    mixed = (seed * 1_000_003 + number * DRAWS + draw) % 2**32
    if settings.search == "tpe":
        return optuna.samplers.TPESampler(seed=mixed, n_startup_trials=startup_trials(settings.trials))
    return optuna.samplers.RandomSampler(mixed)


def startup_trials(trials: int) -> int:
    """Random trials before TPE: a quarter of all, at least 4 and at most 20."""
    return max(4, min(20, trials // 4))
