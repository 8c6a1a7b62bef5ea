"""The files of a sweep folder, from which the sweep resumes; docs/run_folder.md lists them.

Ray Tune's own snapshot is not used for resuming: it lags behind, and it does not restore limits.
"""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.run_folder import (
    IDENTITY,
    MLFLOW_RUN,
    OUTCOME,
    SWEEP,
    TRIAL_PLAN,
    InitialWeights,
    SweepIdentity,
    TrialOutcome,
    TrialPlan,
)
from pipeline.section import differences, flat_fields
from pipeline.storage import Storage
from pipeline.training.config import TrainConfig
from pipeline.training.identity import default_fields, learning_fields
from pipeline.training.validation_config import ValidationConfig
from pipeline.training.validation_sets import ValidationSet
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.space import trial_name

# Settings that decide what the trials' values mean; the others may change between submissions.
_SETTINGS = {"space", "metrics", "value", "mean_validations", "constraints"}


def identity_of(
    base: TrainConfig,
    settings: TuneConfig,
    manifest_sha256: str,
    sets: Sequence[ValidationSet] = (),
    initial: Mapping[str, InitialWeights] | None = None,
    weights: Mapping[str, str] | None = None,
) -> SweepIdentity:
    """What must be equal when the sweep is resumed.

    Args:
        base: the trials' configuration, except for the searched fields.
        sets: the further images of validation.
        initial: the trials' given initial weights, by network.
        weights: sha256 of further weights, by what they are.
    """
    search = settings.model_dump(mode="json", include=_SETTINGS)
    measured: dict[str, Any] = {
        "validate_every_steps": base.validate_every_steps,
        "validation": base.validation.model_dump(mode="json"),
        "images of validation.sets": {each.name: each.sha256[:12] for each in sets},
        "select_by": {"psnr": base.psnr.select_by, "gan": base.gan.select_by},
    }
    given = {f"init.{network}": each.sha256 for network, each in (initial or {}).items()}
    given |= {name: f"sha256 {sha256[:12]}" for name, sha256 in (weights or {}).items()}
    return SweepIdentity(
        {f"tune.{name}": value for name, value in search.items()} | learning_fields(base) | measured | given,
        manifest_sha256,
        dict(initial or {}),
    )


def check(sweep: Storage, settings: TuneConfig, new: SweepIdentity) -> None:
    """Raises UserError if the folder belongs to a training run, or to a sweep with another identity.

    An empty `manifest_sha256` is not compared: the data set does not exist yet.
    """
    if sweep.exists(IDENTITY.path):
        raise UserError(
            f"tune.name={settings.name}: {sweep.uri} is the folder of a training run; choose another tune.name"
        )
    old = SWEEP.read(sweep)
    if old is None:
        return
    before, now = (_comparable(each) for each in (old, new))
    if not new.manifest_sha256:
        before.pop("data set (its manifest)"), now.pop("data set (its manifest)")
    if changed := differences(before, now, json.dumps):
        raise UserError(
            f"tune.name={settings.name} is in use with another configuration ({'; '.join(changed)}); restore it or "
            "choose another tune.name"
        )


def claim(sweep: Storage, settings: TuneConfig, new: SweepIdentity) -> None:
    """Writes the sweep's identity, or checks that it is unchanged. Raises UserError."""
    check(sweep, settings, new)
    if SWEEP.read(sweep) is None:
        SWEEP.write(sweep, new)


def plans(sweep: Storage, settings: TuneConfig) -> list[TrialPlan]:
    """All trials that were proposed, by number. Folders without a valid plan of this sweep are ignored."""
    found = []
    for name in sweep.names("trials"):
        plan = TRIAL_PLAN.at(name=name).read(sweep)
        if plan is None or name != trial_name(plan.values):
            continue
        if set(plan.values) - ({"seed"} if plan.repeats else set()) == set(settings.space):
            found.append(plan)
    return sorted(found, key=lambda plan: plan.number)


def outcomes(sweep: Storage) -> list[TrialOutcome]:
    """The ended trials, by number. Raises UserError if a file is corrupt."""
    files = fnmatch.filter(sweep.names("outcomes"), "trial-*.json")
    read = [OUTCOME.at(name=file.removesuffix(".json")).read(sweep) for file in files]
    return sorted(filter(None, read), key=lambda outcome: outcome.number)


def tracking_run_id(run: Storage) -> str | None:
    """MLflow's id of a run."""
    description = MLFLOW_RUN.read(run)
    return description.run_id if description else None


def _comparable(identity: SweepIdentity) -> dict[str, Any]:
    """Dotted names; the space stays one value, whose keys are dotted names themselves."""
    whole = {name: value for name, value in identity.fields.items() if name.startswith("tune.")}
    rest = {name: value for name, value in identity.fields.items() if name not in whole}
    defaults = default_fields() | flat_fields({"validation": ValidationConfig().model_dump(mode="json")})
    return defaults | whole | flat_fields(rest) | {"data set (its manifest)": identity.manifest_sha256[:12]}
