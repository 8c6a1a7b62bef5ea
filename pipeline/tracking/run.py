"""Opens, resumes and ends the MLflow run of a training run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, require_package, without_secrets
from pipeline.run_folder import MLFLOW_RUN, TrackingDescription
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import SuppressCode, TrackingUnreachable, bounded_requests, cause, connect
from pipeline.tracking.provenance import provenance_tags
from pipeline.tracking.spool import FOLDER, now_ms, published_step
from pipeline.tracking.upload import PARAM_CHARACTERS, TAG_CHARACTERS, log_description, log_end
from pipeline.tracking.uri import artifact_root, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_TAG = "esrgan.key"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedRun:
    """A run that is open in MLflow."""

    uri: str = field(repr=False)
    """Absolute URI of the tracking server; may contain a password, hence excluded from repr."""
    run_id: str
    experiment_id: str
    folder: str
    """The run's folder, which contains its spool."""


def require_tracking(config: TrackingConfig, storage: str) -> None:
    """Checks the tracking server before anything expensive starts; a new database gets its tables.

    Raises:
        UserError: the URI is invalid, or the server is unreachable and `tracking.if_unreachable` is `refuse`.
    """
    uri = resolve_uri(config, storage)
    if not config.enabled:
        return
    try:
        connect(uri)
    except TrackingUnreachable as error:
        _refuse_or_warn(config, error, "training starts without it; metrics are sent later")


def open_run(
    config: TrackingConfig,
    run: Storage,
    *,
    run_name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    config_text: str,
    parent_run_id: str | None = None,
    run_id: str | None = None,
) -> TrackedRun | None:
    """Opens the run in MLflow, or reopens it. Called in the driver, never in a worker.

    Args:
        config: the tracking section.
        run: the run's folder; its parent is the storage.
        run_name: shown in MLflow.
        parameters: flat configuration; values that MLflow has from an earlier attempt are kept, changes become a tag.
        tags: `esrgan.key` identifies the run in MLflow; `esrgan.data` (the manifest's sha256) becomes its data set.
        config_text: the whole configuration, stored as config.yaml.
        parent_run_id: MLflow run of the sweep that this run belongs to.
        run_id: MLflow's id from an earlier attempt, if known.

    Returns:
        The open run; None if tracking is disabled, or the server is unreachable and `tracking.if_unreachable` is
        `spool`.

    Raises:
        UserError: the server is unreachable and `tracking.if_unreachable` is `refuse`, or it rejects the run.
    """
    uri = resolve_uri(config, _storage_of(run))
    earlier = None
    with suppress(UserError):  # a corrupt one is about to be replaced
        earlier = MLFLOW_RUN.read(run)
    all_tags = {**provenance_tags(), **tags}
    description = TrackingDescription(
        experiment=config.experiment,
        uri=without_secrets(uri),
        run_name=run_name,
        parameters={key: _one_value(value, PARAM_CHARACTERS) for key, value in parameters.items()},
        tags={key: _one_value(value, TAG_CHARACTERS) for key, value in all_tags.items()},
        config_text=without_secrets(config_text),
        parent_run_id=parent_run_id,
        run_id=run_id,
        started_ms=(earlier.started_ms if earlier else None) or now_ms(),
    )
    MLFLOW_RUN.write(run, description)
    if not config.enabled:
        return None
    try:
        return open_described(run, uri)
    except TrackingUnreachable as error:
        _refuse_or_warn(config, error, f"metrics are stored in {run.path(FOLDER)} and sent later")
        return None


def open_described(run: Storage, uri: str) -> TrackedRun:
    """Opens the run as its folder describes it; possible at any time, also after the run has ended.

    Raises:
        TrackingUnreachable: no answer.
        UserError: not a run's folder, or the server rejects the run.
    """
    description = require_description(run)
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        with bounded_requests(timeout_s=10, retries=1):
            experiment_id = _experiment(client, description.experiment, artifact_root(uri, _storage_of(run)))
            # The key tag is set on creation: after a crash from here on the run is found again.
            run_id = _find(client, description, experiment_id) or _create(client, description, experiment_id)
            log_description(client, run_id, description, published_step(run))
    except MlflowException as error:
        raise TrackingUnreachable(f"tracking.uri={without_secrets(uri)}: {cause(error)}") from None
    if description.run_id != run_id:
        MLFLOW_RUN.write(run, replace(require_description(run), run_id=run_id))
    return TrackedRun(uri, run_id, experiment_id, run.uri)


def require_description(run: Storage) -> TrackingDescription:
    """What the run's folder contains about its MLflow run. Raises UserError: not a run's folder, a corrupt file."""
    description = MLFLOW_RUN.read(run)
    if description is None:
        raise UserError(f"{run.uri}: not the folder of a run ({MLFLOW_RUN.path} is missing)")
    return description


def require_parent(config: TrackingConfig, storage: str) -> None:
    """Checks, before anything expensive starts, that `open_parent` has a server. Raises UserError."""
    uri = resolve_uri(config, storage)
    if not config.enabled:
        require_package("mlflow", "tune", "train without a sweep")
        raise UserError("tracking.uri=none: a sweep needs a tracking server; set tracking.uri")
    try:
        connect(uri)
    except TrackingUnreachable as error:
        raise UserError(f"{error}; a sweep needs a tracking server: start it") from None


def open_parent(
    config: TrackingConfig, storage: str, *, name: str, key: str, parameters: Mapping[str, Any]
) -> TrackedRun:
    """Opens or reopens the parent run of a sweep's trials (`open_run(parent_run_id=...)`) in `storage`/`name`.

    Raises:
        UserError: the server, which `require_parent` has checked, is unreachable by now, or rejects the run.
    """
    opened = open_run(
        config.model_copy(update={"if_unreachable": "refuse"}),
        Storage(storage) / name,
        run_name=name,
        parameters=parameters,
        tags={KEY_TAG: key},
        config_text="",
    )
    assert opened is not None
    return opened


def finish_run(
    tracked: TrackedRun | None, status: str, run: Storage | None = None, *, reason: str = ""
) -> bool:
    """Sets the run's final status; never raises, so that it cannot hide an exception of the training.

    Status and reason are also written to the run's folder: if the server is unreachable, `send_metrics.py` sets them
    later. The status that a run already has is not set again: the first reason is kept.

    Args:
        tracked: the open run; None if it could not be opened.
        status: FINISHED, FAILED or KILLED.
        run: the run's folder, if `tracked` is None.
        reason: why it failed; becomes the tag `esrgan.failure` and an event, as one line without secrets.

    Returns:
        Whether MLflow has the status.
    """
    folder = run or (Storage(tracked.folder) if tracked else None)
    assert folder is not None
    reason, ended_ms = _one_value(" ".join(reason.split()), TAG_CHARACTERS), now_ms()
    try:
        description = require_description(folder)
        if description.status == status:
            reason, ended_ms = description.reason, description.ended_ms or ended_ms
        else:
            MLFLOW_RUN.write(folder, replace(description, status=status, reason=reason, ended_ms=ended_ms))
    except (OSError, UserError) as error:
        logger.warning("status %s not written to %s: %s", status, folder.uri, cause(error))
    if tracked is None:
        return False
    from mlflow import MlflowClient

    try:
        with bounded_requests(timeout_s=5, retries=1):
            client = MlflowClient(tracked.uri, tracked.uri)
            log_end(client, tracked.run_id, status, ended_ms, reason, published_step(folder))
        return True
    except Exception as error:  # noqa: BLE001 - each database driver has its own exceptions
        logger.warning("status %s not set on run %s: %s", status, tracked.run_id, cause(error))
        return False


def _experiment(client: MlflowClient, name: str, root: str | None) -> str:
    """The experiment's id; a new one gets `root` as its artifact location. Raises UserError."""
    for _ in range(2):
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            if experiment.lifecycle_stage != "active":
                raise UserError(
                    f"tracking.experiment={name}: was deleted in MLflow; restore it there "
                    f"(mlflow experiments restore -x {experiment.experiment_id}) or choose another name"
                )
            return str(experiment.experiment_id)
        with SuppressCode("RESOURCE_ALREADY_EXISTS"):
            return str(client.create_experiment(name, artifact_location=root))
    raise UserError(f"tracking.experiment={name}: cannot be created")


def _find(client: MlflowClient, description: TrackingDescription, experiment_id: str) -> str | None:
    """The run of an earlier attempt, by MLflow's id or by our key tag; a run deleted in MLflow is restored."""
    from mlflow.entities import ViewType

    existing = None
    if description.run_id:
        with SuppressCode("RESOURCE_DOES_NOT_EXIST"):
            existing = client.get_run(description.run_id)
    if existing is None and KEY_TAG in description.tags:
        query = f"tags.`{KEY_TAG}` = '{description.tags[KEY_TAG]}'"
        runs = client.search_runs([experiment_id], query, run_view_type=ViewType.ALL, max_results=1)
        existing = runs[0] if runs else None
    if existing is None:
        return None
    if existing.info.lifecycle_stage == "deleted":
        client.restore_run(existing.info.run_id)
    return str(existing.info.run_id)


def _create(client: MlflowClient, description: TrackingDescription, experiment_id: str) -> str:
    tags = dict(description.tags)
    if description.parent_run_id:
        tags["mlflow.parentRunId"] = description.parent_run_id
    created = client.create_run(experiment_id, description.started_ms, tags, description.run_name)
    return str(created.info.run_id)


def _one_value(value: Any, characters: int) -> str:
    """A value as it is logged: without secrets, cut to MLflow's limit."""
    text = without_secrets("none" if value is None else str(value))
    return text if len(text) <= characters else text[: characters - 3] + "..."


def _storage_of(run: Storage) -> str:
    return run.uri.rpartition("/")[0]


def _refuse_or_warn(config: TrackingConfig, error: TrackingUnreachable, consequence: str) -> None:
    """Raises UserError, or logs a warning, as `tracking.if_unreachable` requires."""
    if config.if_unreachable == "refuse":
        raise UserError(
            f"{error}; start the server, or set tracking.if_unreachable=spool to train now and send metrics later"
        ) from None
    logger.warning("%s; %s", error, consequence)
