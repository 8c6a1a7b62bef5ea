"""Learning rates, and when the loop logs, validates and saves: functions of the step, without a state to resume."""

import math
from dataclasses import dataclass

from pipeline.training.config import Schedule, TrainConfig


def learning_rate(schedule: Schedule, peak: float, step: int, stage_steps: int) -> float:
    """The learning rate of step `step` (from 0) of a stage with `stage_steps` steps.

    Shapes, after a linear warm-up: constant; halved at each milestone (ESRGAN, sec. 4.1); cosine from `peak` to
    `final_share` of it, restarting every `period_steps` (Loshchilov and Hutter 2017, eq. 5). The warm-up is part of
    the first period.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.shape == "halving":
        return peak * 0.5 ** sum(step >= milestone for milestone in schedule.milestones)
    if schedule.shape == "cosine":
        period = schedule.period_steps or stage_steps
        start = schedule.warmup_steps if step < period else 0
        share = (step % period - start) / max(1, period - start)
        return peak * (
            schedule.final_share + (1 - schedule.final_share) * 0.5 * (1 + math.cos(math.pi * share))
        )
    return peak


def stage_rate(config: TrainConfig, stage: str, step: int) -> float:
    """The learning rate of step `step` (from 0, over both stages) of stage `psnr` or `gan`."""
    if stage == "psnr":
        return learning_rate(config.psnr.schedule, config.psnr.learning_rate, step, config.psnr.steps)
    return learning_rate(
        config.gan.schedule, config.gan.learning_rate, step - config.psnr.steps, config.gan.steps
    )


@dataclass(frozen=True)
class Due:
    """What follows an optimizer step."""

    log: bool
    validate: bool
    save: bool


def due(config: TrainConfig, step: int) -> Due:
    """What is due after `step` optimizer steps (over both stages).

    The end of a stage is validated, every validation is saved, and every checkpoint ends a logging interval, so that a
    resumed run begins a whole one.
    """
    stage_ends = step in (config.psnr.steps, config.psnr.steps + config.gan.steps)
    validate = stage_ends or step % config.validate_every_steps == 0
    save = validate or step % config.checkpoint_every_steps == 0
    return Due(log=save or step % config.log_every_steps == 0, validate=validate, save=save)
