"""Sends what a run could not send while it was training, and registers its generator."""

import json
from dataclasses import dataclass

from mlflow.exceptions import MlflowException

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.candidate import Candidate, register_candidate
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.records import published_step
from pipeline.tracking.registry import RegisteredVersion
from pipeline.tracking.runs import RunDescription, TrackedRun
from pipeline.tracking.sender import Sender
from pipeline.tracking.store import StoreAway, reason
from pipeline.tracking.uri import absolute_uri

RESULT = "result.json"


@dataclass(frozen=True)
class LateResult:
    """What was sent, and where to."""

    run_id: str
    status: str
    sent: int
    """Segments sent now."""
    registered: RegisteredVersion | None = None
    """What the generator became now; None when it was not waiting to be registered."""


def send_late(run: Storage, tracking_uri: str | None) -> LateResult:
    """Opens the run in MLflow, sends what counts and is not there yet, and sets how the run ended.

    A generator that waits to be registered is registered, and the run's result gets its version.

    Args:
        run: the run's folder.
        tracking_uri: the store; without it, the one that the run was trained with.

    Raises:
        UserError: not a run's folder, the store is away, or its address held a password and must be given.
    """
    description = RunDescription.load(run)
    uri = tracking_uri or description.uri
    if "***" in uri:
        raise UserError(f"{run.uri}: was tracked in {uri}; give the whole address with ESRGAN_TRACKING__URI")
    sender = Sender(
        run, TrackingConfig(uri=absolute_uri(uri)), None, published_step=lambda: published_step(run)
    )
    try:
        sent = sender.send_pending()
    except StoreAway as error:
        raise UserError(f"{error}; nothing is lost, try again later") from None
    except MlflowException as error:
        raise UserError(f"sending stopped: {reason(error)}; nothing is lost, try again later") from None
    assert sender.tracked is not None
    registered = _register(run, sender.tracked)
    return LateResult(sender.tracked.run_id, description.status, sent, registered)


def _register(run: Storage, tracked: TrackedRun) -> RegisteredVersion | None:
    candidate = Candidate.load(run)
    if candidate is None:
        return None
    registered = register_candidate(run, tracked, candidate)
    if run.exists(RESULT):
        result = json.loads(run.read_bytes(RESULT))
        result |= {"run_id": tracked.run_id, "model_version": registered.version}
        run.write_bytes(RESULT, json.dumps(result, indent=2).encode())
    Candidate.discard(run)
    return registered
