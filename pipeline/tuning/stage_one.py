"""Stage 1 is trained once for all trials that share it.

A trial that differs from another one in stage 2 only has the same stage 1. It is trained as a separate run in
`stage1/` of the sweep; the trials start from copies of its last checkpoint and end with the bits of a trial that trains
both stages itself.
"""

import json
from typing import Any

from pipeline.run_folder import RESULT
from pipeline.section import with_fields
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.checkpoint import CheckpointName
from pipeline.training.config import TrainConfig
from pipeline.training.identity import PACKAGES, installed_version, learning_fields
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.space import axis, digest

FOLDER = "stage1"
# Fields that stage 1 does not depend on: dotted names, or the sections that contain them.
_STAGE_TWO = (
    "gan",
    "perceptual",
    "model.discriminator",
    "model.discriminator_num_feat",
    "init.discriminator",
)


def is_shared(settings: TuneConfig, base: TrainConfig) -> bool:
    """Whether several trials can have the same stage 1: its searched fields have a finite number of values."""
    searched = [
        (name, span)
        for name, span in settings.space.items()
        if not any(f"{name}.".startswith(f"{each}.") for each in _STAGE_TWO)
    ]
    return base.psnr.steps > 0 and all(axis(name, span) is not None for name, span in searched)


def stage_one_of(trial: TrainConfig, base: TrainConfig, manifest_sha256: str) -> TrainConfig | None:
    """The run that trains a trial's stage 1, named by everything that shapes it; None if the trial has only one stage.

    Args:
        base: the sweep's, from which the run has the unused fields of stage 2.
        manifest_sha256: digest of the data set's manifest.
    """
    if not (trial.psnr.steps and trial.gan.steps):
        return None
    has_weights = trial.init.generator is not None
    changes = {
        "gan": base.gan.model_dump() | {"steps": 0},
        "perceptual": base.perceptual.model_dump(),
        "model.discriminator": base.model.discriminator,
        "model.discriminator_num_feat": base.model.discriminator_num_feat,
        "init.discriminator": None,
        "init.partial": trial.init.partial and has_weights,
        "init.adopt_sizes": trial.init.adopt_sizes and has_weights,
    }
    alone = with_fields(trial, changes)
    shaping: dict[str, Any] = {
        "fields": learning_fields(alone),
        "init": alone.init.model_dump(mode="json"),
        "data": manifest_sha256,
        "workers": alone.worker_range,
        "use_gpu": alone.use_gpu,
        "versions": {name: installed_version(name) for name in PACKAGES},
    }
    key = digest(json.dumps(shaping, sort_keys=True))
    return alone.model_copy(update={"run_name": f"stage1-{key}"})


def is_trained(run: Storage, steps: int) -> bool:
    """Whether the run of a stage 1 has finished and has its last checkpoint."""
    result = RESULT.read(run)
    return (
        result is not None
        and result.step == steps
        and CheckpointName(steps, "psnr") in checkpoints.listed(run)
    )
