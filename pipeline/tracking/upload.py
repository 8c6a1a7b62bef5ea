"""Logs a run's description, its segments and its end in MLflow; every call can be repeated without duplicates."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pipeline.run_folder import InitialWeights, TrackingDescription
from pipeline.tracking.connection import bounded_requests, cause, has_code
from pipeline.tracking.spool import Event, ImageRecord, Metrics, Segment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

DATA_TAG = "esrgan.data"
INIT_TAG, INIT_MODEL_TAG = "esrgan.init", "esrgan.init.generator.model_id"
FAILURE_TAG, CHANGED_TAG = "esrgan.failure", "esrgan.changed_on_resume"
EVENTS, EVENTS_TAG = "events.txt", "esrgan.events"
# MLflow rejects longer parameters, tags and data set digests.
PARAM_CHARACTERS, TAG_CHARACTERS, DIGEST_CHARACTERS = 6000, 8000, 36
PARAMS_PER_CALL, POINTS_PER_CALL = 100, 500
_IMAGE_NAMES = uuid.UUID("0f6d0e2c-6a37-4c0e-9c0b-6f0a4f2f7a11")

logger = logging.getLogger(__name__)


def initial_tags(initial: Mapping[str, InitialWeights]) -> dict[str, str]:
    """Tags of a run that starts from given weights: digest and, for a registered model, its version and run."""
    tags = {}
    for network, weights in initial.items():
        tags[f"{INIT_TAG}.{network}"] = weights.sha256
        origin = {"version": weights.version, "model_id": weights.model_id, "run_id": weights.run_id}
        tags |= {f"{INIT_TAG}.{network}.{name}": value for name, value in origin.items() if value}
    return tags


def log_description(
    client: MlflowClient, run_id: str, description: TrackingDescription, last_step: int
) -> None:
    """Logs status, tags, parameters, configuration, data set, and the registered model that training starts from.

    `last_step` is that of the event for a run that failed while the server was unreachable; -1 before the first.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Param, RunTag

    run = client.get_run(run_id)
    logged = run.data
    new = [Param(key, value) for key, value in description.parameters.items() if key not in logged.params]
    # MLflow rejects another value of a logged parameter: changes on resume are logged as a tag.
    changed = {
        key: value for key, value in description.parameters.items() if logged.params.get(key, value) != value
    }
    tags = [RunTag(key, value) for key, value in description.tags.items()]
    if changed:
        tags.append(RunTag(CHANGED_TAG, json.dumps(changed)[:TAG_CHARACTERS]))
    if description.status == "RUNNING":
        client.update_run(run_id, status="RUNNING")
        if FAILURE_TAG in logged.tags:
            client.delete_tag(run_id, FAILURE_TAG)
    else:  # It ended while the server was unreachable.
        log_end(client, run_id, description.status, description.ended_ms, description.reason, last_step)
    client.log_batch(run_id, tags=tags[:100])
    for start in range(0, len(new), PARAMS_PER_CALL):
        client.log_batch(run_id, params=new[start : start + PARAMS_PER_CALL])
    if description.config_text:
        client.log_text(run_id, description.config_text, "config.yaml")
    digest = description.tags.get(DATA_TAG)
    if digest:
        source = json.dumps({"uri": description.parameters.get("data.root", "")})
        data = Dataset("training-data", digest[:DIGEST_CHARACTERS], "local", source)
        client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
    model_id = description.tags.get(INIT_MODEL_TAG)
    known = {model.model_id for model in run.inputs.model_inputs or []} if run.inputs else set()
    if model_id and model_id not in known:
        client.log_inputs(run_id, models=[LoggedModelInput(model_id)])


def log_end(
    client: MlflowClient, run_id: str, status: str, ended_ms: int | None, reason: str, last_step: int
) -> None:
    """Logs the final status, and the reason of a failure as a tag and an event at `last_step`."""
    client.set_terminated(run_id, status, ended_ms)
    if reason:
        client.set_tag(run_id, FAILURE_TAG, reason)
        _log_events(client, run_id, [Event(max(0, last_step), ended_ms or 0, f"run failed: {reason}")])


def send_segment(client: MlflowClient, run_id: str, segment: Segment, sent: int) -> None:
    """Logs a segment's points, images and events.

    `sent` is the step of the last segment sent. If the run resumed from an earlier step (its newest checkpoint was
    corrupt), points up to that step are already in MLflow and are skipped.
    """
    repeated = segment.after < sent
    records = [record for record in segment.records if not (repeated and record.step <= sent)]
    with bounded_requests(timeout_s=10, retries=1):
        points = _points(record for record in records if isinstance(record, Metrics))
        while chunk := list(islice(points, POINTS_PER_CALL)):
            _log_points(client, run_id, chunk)
        images = [record for record in records if isinstance(record, ImageRecord)]
        if images:
            _log_images(client, run_id, images)
        # Unlike points, events are never trained again: those up to `sent` are new as well.
        events = [record for record in segment.records if isinstance(record, Event)]
        if events:
            _log_events(client, run_id, events)


def _points(records: Iterable[Metrics]) -> Iterator[Metric]:
    from mlflow.entities import Metric

    for record in records:
        for key, value in record.values.items():
            yield Metric(re.sub(r"[^\w\-. /]", "_", key)[:250], value, record.time_ms, record.step)


def _log_points(client: MlflowClient, run_id: str, points: list[Metric]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.log_batch(run_id, metrics=points)
    except MlflowException as error:
        # Points that MLflow will never accept must not block later ones; a run deleted in MLflow may be restored.
        deleted = client.get_run(run_id).info.lifecycle_stage == "deleted"
        if deleted or not has_code(error, "INVALID_PARAMETER_VALUE"):
            raise
        logger.warning("%d points rejected by MLflow: %s", len(points), cause(error))


def _log_images(client: MlflowClient, run_id: str, images: list[ImageRecord]) -> None:
    """Logs images where MLflow's page expects them for its slider.

    `log_image` gives them random names, so that a repeated image is shown twice; here the name is derived from the
    image's key, step and time. The layout is that of MLflow 3.17's `log_image`.
    """
    from mlflow.tracking.multimedia import compress_image_size

    with tempfile.TemporaryDirectory(prefix="esrgan-images-") as folder:
        for record in images:
            key = re.sub(r"[^\w\-. ]", "~", record.key)
            stem = f"{key}+step+{record.step}+timestamp+{record.time_ms}"
            name = f"{stem}+{uuid.uuid5(_IMAGE_NAMES, stem)}"
            image = Image.fromarray(record.image)
            image.save(Path(folder) / f"{name}.png")
            compress_image_size(image).save(Path(folder) / f"{name}+compressed.webp")
        client.log_artifacts(run_id, folder, "images")
    client.set_tag(run_id, "mlflow.loggedImages", "True")


def _log_events(client: MlflowClient, run_id: str, events: Iterable[Event]) -> None:
    """Merges events into the run's events.txt: one line each, in the order of steps, equal lines once."""
    lines = {_event_line(event) for event in events}
    if any(file.path == EVENTS for file in client.list_artifacts(run_id)):
        with tempfile.TemporaryDirectory(prefix="esrgan-events-") as folder:
            path = client.download_artifacts(run_id, EVENTS, folder)
            lines |= set(Path(path).read_text(encoding="utf-8").splitlines())
    client.log_text(run_id, "\n".join(sorted(lines)) + "\n", EVENTS)
    client.set_tag(run_id, EVENTS_TAG, str(len(lines)))


def _event_line(event: Event) -> str:
    when = datetime.fromtimestamp(event.time_ms / 1000, UTC)
    text = " ".join(event.text.split())
    return f"step {event.step:8d}  {when:%Y-%m-%d %H:%M:%S}.{event.time_ms % 1000:03d} UTC  {text}"
