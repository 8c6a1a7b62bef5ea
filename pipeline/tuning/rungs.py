"""Early stopping by asynchronous successive halving (ASHA, Li et al. 2020), as a function of the trials' validations.

The rungs are computed from the validations in the trials' folders, so a resumed sweep has the rungs of the first one.
"""

import math
from collections.abc import Iterable, Mapping

from pipeline.errors import UserError
from pipeline.metrics.names import METRICS, metric_of
from pipeline.training.config import TrainConfig
from pipeline.training.schedule import due
from pipeline.tuning.config import TuneConfig

History = Mapping[int, float]
"""Value of the first of `tune.metrics` by step of the compared stage."""


def compared_from(config: TrainConfig) -> int:
    """The step after which trials are compared: the end of stage 1, or 0 without stage 2."""
    return config.psnr.steps if config.gan.steps else 0


def rungs(settings: TuneConfig, steps: int) -> list[int]:
    """The steps of the compared stage at which trials are stopped, below its number of `steps`."""
    found, rung = [], settings.grace_steps
    while rung < steps:
        found.append(rung)
        rung *= settings.reduction_factor
    return found


def require_rungs(settings: TuneConfig, config: TrainConfig) -> None:
    """Raises UserError if no validation could stop a trial before its end."""
    if settings.scheduler == "none":
        return
    start, last = compared_from(config), config.psnr.steps + config.gan.steps
    validated = [step - start for step in range(start + 1, last) if due(config, step).validate]
    if not any(step >= settings.grace_steps for step in validated):
        stage = "gan" if config.gan.steps else "psnr"
        raise UserError(
            f"tune.grace_steps={settings.grace_steps}: no validation of the {stage} stage is between this step and "
            f"its end ({last - start} steps); lower it or validate_every_steps={config.validate_every_steps}"
        )


def reason_to_stop(
    settings: TuneConfig,
    steps: int,
    own: Mapping[int, Mapping[str, float]],
    others: Iterable[Mapping[int, Mapping[str, float]]],
) -> str:
    """Why a trial is stopped after its latest validation; empty: it is not.

    Args:
        settings: the sweep's.
        steps: number of steps of the compared stage.
        own: metrics of this trial by step of the compared stage.
        others: those of all other trials, ended or running.
    """
    metric = settings.metrics[0]

    def values(history: Mapping[int, Mapping[str, float]]) -> History:
        return {step: metrics[metric] for step, metrics in history.items() if metric in metrics}

    measured = values(own)
    if settings.scheduler == "none" or not is_weak(settings, steps, measured, map(values, others)):
        return ""
    step = max(measured)
    return f"stopped early: {metric} {measured[step]:.4f} at step {step} of {steps}"


def is_weak(settings: TuneConfig, steps: int, own: History, others: Iterable[History]) -> bool:
    """Whether a trial should be stopped after its latest validation.

    A trial reaches a rung at its first validation at or after the rung's step. There it must be among the best
    1/reduction_factor of all trials that have reached the rung so far; the first `reduction_factor` - 1 trials are only
    compared with each other's best.

    Args:
        steps: number of steps of the compared stage.
        own: validations of this trial.
        others: validations of all other trials, ended or running.
    """
    latest = max(own, default=0)
    reached = [rung for rung in rungs(settings, steps) if _at(own, rung) == latest]
    if not reached or latest >= steps:
        return False
    rung = reached[-1]
    cost = METRICS[metric_of(settings.metrics[0])].cost
    costs = [cost(history[step]) for history in others if (step := _at(history, rung)) is not None]
    own_cost = cost(own[latest])
    sorted_costs = sorted([*filter(math.isfinite, costs), own_cost])
    kept = max(1, len(sorted_costs) // settings.reduction_factor)
    return not math.isfinite(own_cost) or own_cost > sorted_costs[kept - 1]


def _at(history: History, rung: int) -> int | None:
    """The first validated step at or after a rung."""
    return min((step for step in history if step >= rung), default=None)
