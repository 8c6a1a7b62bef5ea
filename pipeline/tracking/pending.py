"""Sends what MLflow lacks of a run whose tracking server was unreachable: metrics, status, generator."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import MASK, UserError, require_package
from pipeline.run_folder import RESULT, SENT
from pipeline.section import validated
from pipeline.storage import Storage
from pipeline.tracking.candidate import Candidate
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import TrackingUnreachable, cause
from pipeline.tracking.registry import RegisteredVersion, register_candidate
from pipeline.tracking.run import require_description
from pipeline.tracking.sender import Sender
from pipeline.tracking.spool import published_step
from pipeline.tracking.uri import absolute_uri, known_uri, resolve_uri

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UploadResult:
    """What was sent, and the run that received it."""

    run_id: str
    status: str
    sent: int
    """Segments sent by this call."""
    registered: RegisteredVersion | None = None
    """The version registered by this call; None if there was no candidate."""


def upload_pending(run: Storage, tracking_uri: str | None, model_name: str | None = None) -> UploadResult:
    """Opens the run in MLflow, sends the segments that it lacks, sets the run's status, registers its candidate.

    The registered version is also written to the run's result.

    Args:
        run: the run's folder.
        tracking_uri: the tracking server; by default, that of the run.
        model_name: the registered model that receives the candidate; by default, that of the run's configuration.

    Raises:
        UserError: not a run's folder, the server is unreachable, or none is known; or a name that cannot be registered.
    """
    tracking = require_description(run)
    uri = known_uri(tracking_uri) if tracking_uri else _tracking_uri_of(run, tracking.uri)
    require_package("mlflow", f"tracking.uri={uri}", "run this where it is")
    from mlflow.exceptions import MlflowException

    values = {"uri": uri, **({"model_name": model_name} if model_name is not None else {})}
    config = validated(TrackingConfig, values, [("flag", values)], {"model_name": "--tracking.model_name"})
    sender = Sender(run, config, None, published_step=lambda: published_step(run))
    try:
        sent = sender.send_pending()
    except TrackingUnreachable as error:
        raise UserError(f"{error}; no data was lost, try again later") from None
    except MlflowException as error:
        raise UserError(f"sending failed: {cause(error)}; no data was lost, try again later") from None
    assert sender.tracked is not None
    registered = None
    candidate = Candidate.load(run)
    if candidate is not None:
        if model_name is not None:
            description = replace(candidate.description, model_name=model_name)
            candidate = replace(candidate, description=description)
        registered = register_candidate(sender.tracked, candidate)
        result = RESULT.read(run)
        if result is not None:
            run_id = sender.tracked.run_id
            RESULT.write(run, replace(result, run_id=run_id, model_version=registered.version))
        Candidate.discard(run)
    return UploadResult(sender.tracked.run_id, tracking.status, sent, registered)


def _tracking_uri_of(run: Storage, uri: str) -> str:
    """The tracking URI of a run that was trained with `uri`. Raises UserError: none is known.

    Without a server, or with a masked one, it is that of `known_uri`; for a database that is gone, because the storage
    was moved, the one next to the run.
    """
    if uri == "none" or MASK in uri:
        return known_uri(None)
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return resolve_uri(TrackingConfig(), run.uri.rpartition("/")[0])
    return absolute_uri(uri)


def send_unsent(run: Storage, tracking_uri: str) -> None:
    """Sends the last points of a run that has ended, which one that was stopped may not have sent; never raises."""
    try:
        sent = SENT.read(run)
        if published_step(run) > (sent.step if sent else -1):
            upload_pending(run, tracking_uri)
    except (OSError, UserError) as error:
        logger.warning("%s: %s", run.uri, error)
