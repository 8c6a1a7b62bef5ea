"""What makes a run this run: fields that must not change when it is resumed."""

import json
import uuid
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training.config import TrainConfig

FILE = "run.json"

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


def claim(run: Storage, config: TrainConfig, manifest_sha256: str) -> RunIdentity:
    """The run's identity, new or as it was.

    Raises:
        UserError: the folder holds a run with other learning fields or other data.
    """
    mine = RunIdentity(uuid.uuid4().hex, _fields(config), manifest_sha256)
    there = load(run)
    if there is None:
        save(run, mine)
        return mine
    require_same_fields(there, config)
    if there.manifest_sha256 != manifest_sha256:
        raise UserError(
            f"run_name={config.run_name}: {run.uri} was trained on another data set (manifest "
            f"{there.manifest_sha256[:12]}, now {manifest_sha256[:12]}); choose another run_name or the former data"
        )
    return there


def require_same_fields(there: RunIdentity, config: TrainConfig) -> None:
    """Raises UserError, naming the fields, when `config` would not continue the run that is there."""
    # A run from before a field existed has its default.
    before, now = _flat(_fields(TrainConfig()) | there.fields), _flat(_fields(config))
    different = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]
    if different:
        raise UserError(
            f"run_name={config.run_name} is in use with another configuration ({'; '.join(different)}); "
            "choose another run_name, or restore these fields"
        )


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


def _fields(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", include=set(LEARNING_FIELDS))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
