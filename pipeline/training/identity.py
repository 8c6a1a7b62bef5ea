"""Run identity: settings that must match on resume unless --accept-changes."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from pipeline.errors import UserError
from pipeline.run_folder import IDENTITY, RESULT, InitialWeights, RunIdentity
from pipeline.section import differences, flat_fields
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.config import TrainConfig
from pipeline.training.init_config import NETWORKS

# Packages of which another version may compute different bits.
PACKAGES = ("esrgan-ray", "torch")

# Fields that decide what is learned; a GPU adds in another order than a CPU. The others (paths, number of workers,
# logging) may change between attempts.
LEARNING_FIELDS = (
    "seed", "batch_size", "crop_px", "shuffle_channels", "psnr", "gan", "perceptual", "adam", "model", "ema_decay",
    "precision", "deterministic", "channels_last", "use_gpu",
)  # fmt: skip


def identity_of(
    config: TrainConfig, manifest_sha256: str, initial: Mapping[str, InitialWeights] | None = None
) -> RunIdentity:
    """The identity of a new run; `initial` has its given initial weights by network."""
    versions = {name: installed_version(name) for name in PACKAGES}
    key, fields = uuid.uuid4().hex, learning_fields(config)
    return RunIdentity(key, fields, manifest_sha256, versions=versions, initial=dict(initial or {}))


def installed_version(package: str) -> str:
    """A package's version; `not installed` for this project when it is run from its folder."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def learning_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields that decide what is learned, as JSON values."""
    fields = config.model_dump(mode="json", include=set(LEARNING_FIELDS))
    del fields["gan"]["allow_random_start"]  # a permission; psnr.steps decides
    for stage in ("psnr", "gan"):
        del fields[stage]["select_by"]
    return fields


def default_fields() -> dict[str, Any]:
    """Defaults of the learning fields, by dotted name: a run of an earlier version has them for fields added since."""
    fields = learning_fields(TrainConfig())
    del fields["perceptual"]["layers"]  # its keys are values, not fields
    return flat_fields(fields)


def diff(old: RunIdentity, new: RunIdentity) -> list[str]:
    """What differs, as `name was A, now B`, sorted by name; the key and MLflow's run id are not compared."""
    before, now = (
        default_fields()
        | flat_fields(each.fields)
        | each.versions
        | {f"init.{network}": f"sha256 {weights.sha256[:12]}" for network, weights in each.initial.items()}
        | {"data set (its manifest)": each.manifest_sha256[:12]}
        for each in (old, new)
    )
    return differences(before, now)


def check_resume(
    config: TrainConfig,
    run: Storage,
    old: RunIdentity,
    new: RunIdentity,
    changes: Sequence[str],
    accept: bool,
) -> None:
    """Decides whether a run may resume although its identity changes from `old` to `new`.

    A run without a checkpoint and without a result has nothing to lose, so it may always change.

    Raises:
        UserError: the changes were not accepted, or the run cannot resume with them.
    """
    if not changes or not has_begun(run):
        return
    name = f"run_name={config.run_name}"
    if not accept:
        raise UserError(
            f"{name} is in use with another configuration ({'; '.join(changes)}); "
            "choose another run_name, restore these, or accept the change: --accept-changes"
        )
    if not checkpoints.can_resume(run):
        raise UserError(
            f"{name} has finished and has no checkpoints, so it cannot resume with changes ({'; '.join(changes)}); "
            "choose another run_name"
        )
    names = checkpoints.listed(run)
    step, in_stage_two = (names[-1].step, names[-1].stage == "gan") if names else (0, False)
    for network in NETWORKS if in_stage_two else ("generator",):
        before, now = (each.initial.get(network) for each in (old, new))
        if (before and before.sha256) != (now and now.sha256):
            began = f"from {before.source}" if before else "with random weights"
            raise UserError(f"init.{network}: the {network} of {name} began {began}; choose another run_name")
    old_psnr_steps = old.fields["psnr"]["steps"]
    if in_stage_two and old_psnr_steps != config.psnr.steps:
        raise UserError(
            f"psnr.steps={config.psnr.steps}: stage 2 of {name} began after {old_psnr_steps} steps of stage 1; "
            "restore that"
        )
    if step > config.psnr.steps + (config.gan.steps if in_stage_two else 0):
        raise UserError(
            f"psnr.steps={config.psnr.steps}, gan.steps={config.gan.steps}: {name} is already at step {step} "
            f"({names[-1].stage} stage); use more steps"
        )


def claim(run: Storage, old: RunIdentity | None, new: RunIdentity, changes: Sequence[str]) -> RunIdentity:
    """Writes the identity that the run has from now on, and returns it; `changes` were checked by `check_resume`."""
    if old is not None and not changes:
        if old.initial == new.initial:
            return old
        new = replace(old, initial=new.initial)  # equal weights from another source
    elif old is not None and has_begun(run):
        print(f"resuming with changes: {'; '.join(changes)}", flush=True)
        new = replace(new, key=old.key, tracking_run_id=old.tracking_run_id)
    IDENTITY.write(run, new)
    return new


def has_begun(run: Storage) -> bool:
    """Whether a run has something to lose: a checkpoint or a result."""
    return checkpoints.can_resume(run) or run.exists(RESULT.path)
