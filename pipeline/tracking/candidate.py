"""The generator of a finished run, kept in the run's folder until it is registered.

If the tracking server is unreachable when training ends, `upload_pending` sends the remaining metrics and registers
the generator later.
"""

import hashlib
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import MASK, UserError, require_package, without_secrets
from pipeline.run_folder import CANDIDATE, RESULT, SENT, CandidateDescription, TrainedGenerator
from pipeline.section import validated
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import TrackingUnreachable, bounded_requests, cause, connect
from pipeline.tracking.logged_model import log_model
from pipeline.tracking.lookup import one_line_errors
from pipeline.tracking.model_card import ModelCard
from pipeline.tracking.registry import UPLOAD_LIMITS, RegisteredVersion, register_generator
from pipeline.tracking.run import TrackedRun, require_description
from pipeline.tracking.sender import Sender
from pipeline.tracking.spool import FOLDER, from_png, published_step, to_png
from pipeline.tracking.uri import absolute_uri, known_uri, resolve_uri

CANDIDATE_FOLDER = f"{FOLDER}/candidate"
EXAMPLE = f"{CANDIDATE_FOLDER}/example.png"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """Everything that is needed to register a run's generator at any later time."""

    model_name: str
    generator: TrainedGenerator
    earlier: tuple[TrainedGenerator, ...]
    """Results of earlier stages: logged with their metrics for comparison, not registered."""
    evaluation_set: str
    """Digest of the images that the metrics were measured on."""
    card: ModelCard

    def save(self, run: Storage) -> None:
        """Writes it atomically into the run's folder, without secrets. Raises OSError."""
        run.remove(CANDIDATE_FOLDER)
        for index, image in enumerate(self.card.images.values()):
            run.write_bytes(_image_file(index), to_png(image))
        if self.card.example is not None:
            run.write_bytes(EXAMPLE, to_png(self.card.example))
        description = CandidateDescription(
            model_name=self.model_name,
            metric=self.card.selected_by,
            generator=self.generator,
            earlier=list(self.earlier),
            evaluation_set=self.evaluation_set,
            config_text=without_secrets(self.card.config_text),
            data_sha256=self.card.data_sha256,
            data=self.card.data,
            license=self.card.license,
            images=list(self.card.images),
            example=self.card.example is not None,
            initial=dict(self.card.initial),
            bicubic=dict(self.card.bicubic),
        )
        CANDIDATE.write(run, description)

    @staticmethod
    def load(run: Storage) -> "Candidate | None":
        """The run's candidate; None if there is none. Raises UserError if it is corrupt."""
        saved = CANDIDATE.read(run)
        if saved is None:
            return None
        try:
            images = {
                title: from_png(run.read_bytes(_image_file(index)))
                for index, title in enumerate(saved.images)
            }
            example = from_png(run.read_bytes(EXAMPLE)) if saved.example else None
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{run.path(CANDIDATE_FOLDER)}: corrupt ({error}); {CANDIDATE.remedy}") from None
        card = ModelCard(
            config_text=saved.config_text,
            data_sha256=saved.data_sha256,
            data=saved.data,
            license=saved.license,
            images=images,
            example=example,
            selected_by=saved.metric,
            initial=saved.initial,
            bicubic=saved.bicubic,
        )
        return Candidate(saved.model_name, saved.generator, tuple(saved.earlier), saved.evaluation_set, card)

    @staticmethod
    def discard(run: Storage) -> None:
        """Deletes the saved candidate (already registered)."""
        run.remove(CANDIDATE_FOLDER)


@dataclass(frozen=True)
class UploadResult:
    """What was sent, and the run that received it."""

    run_id: str
    status: str
    sent: int
    """Segments sent by this call."""
    registered: RegisteredVersion | None = None
    """The version registered by this call; None if there was no candidate."""


def trained_generator(run: Storage, file: str, step: int, metrics: dict[str, float]) -> TrainedGenerator:
    """Describes a generator's file by its present content. Raises OSError."""
    return TrainedGenerator(file, hashlib.sha256(run.read_bytes(file)).hexdigest(), step, metrics)


def register_candidate(run: Storage, tracked: TrackedRun, candidate: Candidate) -> RegisteredVersion:
    """Logs and registers a run's generators; repeating it returns the same version.

    Raises:
        UserError: the server is unreachable or rejects it, or a file is corrupt; run the same command again.
    """
    name, data, best = candidate.model_name, candidate.evaluation_set, candidate.generator
    earlier_card = replace(candidate.card, images={}, is_chosen=False)
    with tempfile.TemporaryDirectory(prefix="esrgan-generator-") as folder:
        for earlier in candidate.earlier:
            path, what = _fetch(run, earlier, Path(folder)), f"logging the generator of step {earlier.step}"
            with one_line_errors(what, tracked.uri), bounded_requests(**UPLOAD_LIMITS):
                client = connect(tracked.uri)
                log_model(client, tracked, name, path, earlier.step, earlier.metrics, data, earlier_card)
        return register_generator(
            tracked,
            TrackingConfig(model_name=name),
            _fetch(run, best, Path(folder)),
            step=best.step,
            metrics=best.metrics,
            evaluation_set=data,
            card=candidate.card,
        )


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
    description = require_description(run)
    uri = known_uri(tracking_uri) if tracking_uri else _tracking_uri_of(run, description.uri)
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
            candidate = replace(candidate, model_name=model_name)
        registered = register_candidate(run, sender.tracked, candidate)
        result = RESULT.read(run)
        if result is not None:
            run_id = sender.tracked.run_id
            RESULT.write(run, replace(result, run_id=run_id, model_version=registered.version))
        Candidate.discard(run)
    return UploadResult(sender.tracked.run_id, description.status, sent, registered)


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


def _fetch(run: Storage, generator: TrainedGenerator, folder: Path) -> Path:
    """Copies a generator's file to a local folder. Raises UserError."""
    what = f"{run.path(generator.file)}: the generator cannot be registered"
    try:
        content = run.read_bytes(generator.file)
    except FileNotFoundError:
        raise UserError(f"{what}, its file is missing") from None
    if hashlib.sha256(content).hexdigest() != generator.sha256:
        raise UserError(f"{what}, its file is corrupt")
    path = folder / "generator.safetensors"
    path.write_bytes(content)
    return path


def _image_file(index: int) -> str:
    return f"{CANDIDATE_FOLDER}/image-{index}.png"
