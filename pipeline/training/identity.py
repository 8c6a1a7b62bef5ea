"""What makes a run this run: what must not change when it is resumed, unless the user says so."""

import json
import uuid
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any

from pipeline.errors import UserError
from pipeline.section import flat_fields
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.config import TrainConfig

FILE = "run.json"
RESULT = "result.json"
# Packages whose other versions may compute other bits.
PACKAGES = ("esrgan-ray", "torch")

# Fields that decide what is learned. The rest (where, how many workers, how often to log) may differ from try to try.
LEARNING_FIELDS = (
    "seed", "batch_size", "crop_px", "shuffle_channels", "psnr", "gan", "perceptual", "adam", "model", "ema_decay",
    "precision", "channels_last",
)  # fmt: skip


@dataclass(frozen=True)
class RunIdentity:
    """The lasting facts of a run, in its folder from the first try on."""

    key: str
    """Made once; tracking finds the run by it."""
    fields: dict[str, Any]
    """The learning fields' values."""
    manifest_sha256: str
    """Digest of the data set's manifest."""
    tracking_run_id: str | None = None
    """MLflow's id, once the run is open there."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of PACKAGES; runs from before it was kept have none."""


def claim(
    run: Storage,
    config: TrainConfig,
    manifest_sha256: str,
    accept_changes: bool = False,
    compare_versions: bool = True,
) -> RunIdentity:
    """The run's identity, new or as it was.

    A run that has neither checkpoint nor result has nothing to lose, and becomes a new one when it is changed.

    Raises:
        UserError: the folder holds a run with other learning fields, other data or of other package versions, and
            `accept_changes` does not allow it, or cannot.
    """
    mine = RunIdentity(uuid.uuid4().hex, learning_fields(config), manifest_sha256, versions=_versions())
    there = load(run)
    if there is not None:
        different = require_same(run, there, config, manifest_sha256, accept_changes, compare_versions)
        if not different:
            return there
        if _begun(run):
            print(f"going on with changes: {'; '.join(different)}", flush=True)
            mine = replace(mine, key=there.key, tracking_run_id=there.tracking_run_id)
    save(run, mine)
    return mine


def require_same(
    run: Storage,
    there: RunIdentity,
    config: TrainConfig,
    manifest_sha256: str | None = None,
    accept_changes: bool = False,
    compare_versions: bool = True,
) -> list[str]:
    """What differs, each as `name was A, now B`, where that may be.

    Args:
        run: the run's folder.
        there: its identity.
        config: what it is to go on with.
        manifest_sha256: digest of the data set's manifest, where it is known already.
        accept_changes: let everything differ but what the run cannot go on from.
        compare_versions: whether other versions of packages count.

    Raises:
        UserError: naming what differs, when `config` would not continue the run that is there.
    """
    mine = RunIdentity(
        there.key, learning_fields(config), manifest_sha256 or there.manifest_sha256, versions=_versions()
    )
    different = _different(there, mine, compare_versions)
    if not different or not _begun(run):
        return different
    if not accept_changes:
        raise UserError(
            f"run_name={config.run_name} is in use with another configuration ({'; '.join(different)}); "
            "choose another run_name, restore these, or go on with the change: --accept-changes"
        )
    if not checkpoints.any_there(run):
        raise UserError(
            f"run_name={config.run_name} has ended, and its checkpoints are gone, so it cannot go on with changes "
            f"({'; '.join(different)}); choose another run_name"
        )
    names = checkpoints.listed(run)
    step, in_stage_two = (names[-1].step, names[-1].stage == "gan") if names else (0, False)
    if in_stage_two and there.fields["psnr"]["steps"] != config.psnr.steps:
        raise UserError(
            f"psnr.steps={config.psnr.steps}: stage 2 of run_name={config.run_name} has begun after "
            f"{there.fields['psnr']['steps']} steps of stage 1; restore that"
        )
    if step > config.psnr.steps + (config.gan.steps if in_stage_two else 0):
        raise UserError(
            f"psnr.steps={config.psnr.steps}, gan.steps={config.gan.steps}: run_name={config.run_name} is at step "
            f"{step} of stage {names[-1].stage} already; use more steps"
        )
    return different


def _begun(run: Storage) -> bool:
    return checkpoints.any_there(run) or run.exists(RESULT)


def _different(there: RunIdentity, mine: RunIdentity, compare_versions: bool) -> list[str]:
    # A run from before a field existed has its default.
    before, now = flat_fields(learning_fields(TrainConfig()) | there.fields), flat_fields(mine.fields)
    for name in there.versions.keys() & mine.versions.keys() if compare_versions else ():
        before[name], now[name] = there.versions[name], mine.versions[name]
    if there.manifest_sha256 != mine.manifest_sha256:
        before["data set (its manifest)"] = there.manifest_sha256[:12]
        now["data set (its manifest)"] = mine.manifest_sha256[:12]
    return [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]


def load(run: Storage) -> RunIdentity | None:
    """The identity in the run's folder, if there is one. Raises UserError when it cannot be read."""
    if not run.exists(FILE):
        return None
    try:
        return RunIdentity(**json.loads(run.read_bytes(FILE)))
    except (ValueError, TypeError):
        raise UserError(
            f"{run.path(FILE)}: not a run's identity; restore it or choose another run_name"
        ) from None


def save(run: Storage, identity: RunIdentity) -> None:
    """Writes the identity, whole or not at all."""
    run.write_bytes(FILE, json.dumps(asdict(identity), indent=2).encode())


def with_tracking(run: Storage, identity: RunIdentity, tracking_run_id: str) -> RunIdentity:
    """The identity with MLflow's id, saved."""
    if identity.tracking_run_id == tracking_run_id:
        return identity
    identity = replace(identity, tracking_run_id=tracking_run_id)
    save(run, identity)
    return identity


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def learning_fields(config: TrainConfig) -> dict[str, Any]:
    """The values, as JSON, of the fields that decide what is learned."""
    fields = config.model_dump(mode="json", include=set(LEARNING_FIELDS))
    del fields["gan"]["allow_random_start"]  # A permission: psnr.steps decides.
    return fields
