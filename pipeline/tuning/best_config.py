"""best.yaml: the best trial's values as a configuration that `train_gan.py --config` trains at full length."""

from typing import Any

import yaml

from pipeline.errors import MASK
from pipeline.run_folder import TrialOutcome
from pipeline.section import flat_fields, with_fields
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.space import shown_metrics, trial_config

# What a sweep shortens. The defaults of these fields are those of the published recipe.
_LENGTH = ("log_every_steps", "checkpoint_every_steps", "validate_every_steps")


def best_config(config: TrainConfig, settings: TuneConfig, best: TrialOutcome) -> TrainConfig:
    """The sweep's configuration with the best trial's values, and the steps and schedules of the published recipe.

    A stage that the sweep skips stays skipped, and a field that was searched keeps its best value. The paths of
    `config` are absolute.
    """
    full = TrainConfig()
    changes: dict[str, Any] = {name: getattr(full, name) for name in _LENGTH}
    for stage in ("psnr", "gan"):
        if getattr(config, stage).steps:
            changes[f"{stage}.steps"] = getattr(full, stage).steps
            changes |= flat_fields({stage: {"schedule": getattr(full, stage).schedule.model_dump()}})
    changes["run_name"] = f"{settings.name[:95]}-best"  # at most 100 characters
    searched = {
        name: value for name, value in best.values.items() if name != "seed" or "seed" in settings.space
    }
    return with_fields(trial_config(config, searched), {
        name: value for name, value in changes.items()
        if not any(f"{name}.".startswith(f"{each}.") for each in searched)
    })  # fmt: skip


def best_yaml(config: TrainConfig, settings: TuneConfig, best: TrialOutcome) -> bytes:
    """The file's content."""
    values = best_config(config, settings, best).model_dump(mode="json")
    if MASK in (values["tracking"]["uri"] or ""):
        del values["tracking"]["uri"]  # it has a password: set ESRGAN_TRACKING__URI
    measured = shown_metrics(best.metrics, settings.metrics)
    head = [
        f"The best trial of the sweep {settings.name}: {best.run_name}, {measured} at step {best.step}.",
        "The sweep's configuration with the values of this trial, and the steps and schedules of the published recipe.",
        "A small data set needs fewer steps: lower psnr.steps and gan.steps.",
        "Command: python jobs/train_gan.py --config best.yaml",
    ]
    return ("".join(f"# {line}\n" for line in head) + yaml.safe_dump(values, sort_keys=False)).encode()
