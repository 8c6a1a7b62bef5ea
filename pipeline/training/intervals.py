"""When the loop logs, validates and saves: a function of the configuration and the step."""

from dataclasses import dataclass

from pipeline.training.config import TrainConfig


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
