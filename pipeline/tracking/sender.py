"""Carries the spool into MLflow, beside training and never in its way."""

import json
import logging
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking.multimedia import compress_image_size
from PIL import Image

from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.records import (
    FOLDER,
    DamagedSegment,
    Event,
    Metrics,
    Picture,
    Segment,
    read_segment,
    segment_steps,
)
from pipeline.tracking.runs import TrackedRun, open_described
from pipeline.tracking.store import is_code, reason, waits
from pipeline.tracking.uri import resolve_uri

MARK = f"{FOLDER}/sent.json"
EVENTS, EVENTS_TAG = "events.txt", "esrgan.events"
POINTS_IN_A_CALL = 500
LONGEST_PAUSE_S = 30.0
_PICTURES = uuid.UUID("0f6d0e2c-6a37-4c0e-9c0b-6f0a4f2f7a11")

logger = logging.getLogger(__name__)


class Sender:
    """A thread that sends segments once they count, in order, for as long as the block lasts.

    A store that is away only makes it wait: 1 s, then longer, up to 30 s. Everything that it sends may be sent again
    without doubling: points keep their step, time and value, pictures their names. So the mark of the last segment
    sent, `tracking/sent.json`, saves work and is not needed for correctness.

    Args:
        run: the run's folder.
        config: the tracking section.
        tracked: the open run; None when the store was away at the start: the sender opens it then.
        published_step: step of the newest published checkpoint; -1 without one.
        poll_s: pause between two looks at the spool, in seconds.
    """

    def __init__(
        self,
        run: Storage,
        config: TrackingConfig,
        tracked: TrackedRun | None,
        *,
        published_step: Callable[[], int],
        poll_s: float = 2.0,
    ) -> None:
        self.run = run
        self.tracked = tracked
        self._uri = tracked.uri if tracked else resolve_uri(config, run.uri.rpartition("/")[0])
        self._published_step = published_step
        self._poll_s = poll_s
        self._sent: int | None = None
        self._failing = False
        self._rounds = 0
        self._stop = False
        self._now = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="metrics-sender", daemon=True)

    def __enter__(self) -> "Sender":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        # A request may be under way; it ends by its own time-out. The thread does not keep the process alive.
        self._thread.join(timeout=20)

    def flush(self, timeout_s: float) -> int:
        """Sends what counts by now, trying again until it is done or the time is over.

        Returns:
            Segments that are left; 0 when all is sent.
        """
        ends = time.monotonic() + timeout_s
        with self._changed:
            # A round that is under way may have begun before the newest segment counted.
            enough = self._rounds + 2
            while self._thread.is_alive() and time.monotonic() < ends:
                self._now = True
                self._changed.notify_all()
                self._changed.wait(timeout=min(1.0, max(0.0, ends - time.monotonic())))
                if self._rounds >= enough and not self._failing:
                    return 0
        return len(self.pending())

    def pending(self) -> list[int]:
        """Steps of the segments that count and are not sent."""
        sent, published = self._mark(), self._published_step()
        return [step for step in segment_steps(self.run) if sent < step <= published]

    def send_pending(self) -> int:
        """Sends them, on the calling thread.

        Returns:
            Segments sent.

        Raises:
            StoreAway, MlflowException, OSError: what could not be sent is sent the next time.
        """
        if self.tracked is None:
            self.tracked = open_described(self.run, self._uri)
        count = 0
        for step in self.pending():
            if self._stop:
                break
            try:
                send_segment(self.tracked, read_segment(self.run, step), self._mark())
            except DamagedSegment as error:
                logger.warning("%s; left out", error)
            self._keep_mark(step)
            count += 1
        return count

    def _work(self) -> None:
        pause_s = self._poll_s
        while not self._stop:
            try:
                self.send_pending()
                failing, pause_s = False, self._poll_s
            except Exception as error:  # noqa: BLE001 - whatever it is, training must go on, and nothing is lost
                failing, pause_s = True, min(LONGEST_PAUSE_S, max(1.0, 2 * pause_s))
                if not self._failing:
                    logger.warning("metrics wait in %s: %s", self.run.path(FOLDER), reason(error))
            with self._changed:
                self._failing = failing
                self._rounds += 1
                self._changed.notify_all()
                least_s = 1.0 if failing else 0.0  # Also when somebody waits in flush().
                self._changed.wait_for(lambda: self._stop, timeout=least_s)
                self._changed.wait_for(lambda: self._stop or self._now, timeout=pause_s - least_s)
                self._now = False

    def _mark(self) -> int:
        """Step of the last segment sent to this very run; -1 without one."""
        if self._sent is None:
            try:
                mark = json.loads(self.run.read_bytes(MARK))
                mine = self.tracked is not None and mark["run_id"] == self.tracked.run_id
                if not mine:
                    return -1
                self._sent = int(mark["step"])
            except (OSError, ValueError, KeyError, TypeError):
                return -1
        return self._sent

    def _keep_mark(self, step: int) -> None:
        assert self.tracked is not None
        self._sent = step
        try:
            self.run.write_bytes(MARK, json.dumps({"run_id": self.tracked.run_id, "step": step}).encode())
        except (
            OSError
        ) as error:  # A full disk: a later process sends these segments again, which changes nothing.
            logger.warning("%s not written: %s", self.run.path(MARK), reason(error))


def send_segment(tracked: TrackedRun, segment: Segment, sent: int) -> None:
    """Sends one segment; sending it again changes nothing.

    Args:
        tracked: the open run.
        segment: what to send.
        sent: step of the last segment sent. When the run went back behind it (its newest checkpoint was damaged),
            points up to that step are there already, and are left out.
    """
    client = MlflowClient(tracked.uri, tracked.uri)
    behind = segment.after < sent
    records = [record for record in segment.records if not (behind and record.step <= sent)]
    with waits(timeout_s=10, retries=1):
        for points in _chunks(_points(record for record in records if isinstance(record, Metrics))):
            _log_points(client, tracked, points)
        pictures = [record for record in records if isinstance(record, Picture)]
        if pictures:
            _log_pictures(client, tracked, pictures)
        # Unlike points, what happened is never trained again: also events before `sent` are new.
        events = [record for record in segment.records if isinstance(record, Event)]
        if events:
            _log_events(client, tracked, events)


def _points(records: Iterable[Metrics]) -> Iterator[Metric]:
    for record in records:
        for key, value in record.values.items():
            yield Metric(_key(key), value, record.time_ms, record.step)


def _chunks(points: Iterable[Metric]) -> Iterator[list[Metric]]:
    chunk: list[Metric] = []
    for point in points:
        chunk.append(point)
        if len(chunk) == POINTS_IN_A_CALL:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _log_points(client: MlflowClient, tracked: TrackedRun, points: list[Metric]) -> None:
    try:
        client.log_batch(tracked.run_id, metrics=points)
    except MlflowException as error:
        # What MLflow will never take must not stop what comes after; a run deleted in its page may come back.
        deleted = client.get_run(tracked.run_id).info.lifecycle_stage == "deleted"
        if deleted or not is_code(error, "INVALID_PARAMETER_VALUE"):
            raise
        logger.warning("%d points refused by MLflow: %s", len(points), reason(error))


def _log_pictures(client: MlflowClient, tracked: TrackedRun, pictures: list[Picture]) -> None:
    """Puts pictures where MLflow's page looks for its slider.

    `log_image` gives them random names, so that a repeated one is shown twice; here the name follows from the
    picture's key, step and time. The layout is that of MLflow 3.17's `log_image`.
    """
    with tempfile.TemporaryDirectory(prefix="esrgan-pictures-") as folder:
        for picture in pictures:
            key = re.sub(r"[^\w\-. ]", "~", picture.key)
            place = f"{key}+step+{picture.step}+timestamp+{picture.time_ms}"
            name = f"{place}+{uuid.uuid5(_PICTURES, place)}"
            image = Image.fromarray(picture.image)
            image.save(Path(folder) / f"{name}.png")
            compress_image_size(image).save(Path(folder) / f"{name}+compressed.webp")
        client.log_artifacts(tracked.run_id, folder, "images")
    client.set_tag(tracked.run_id, "mlflow.loggedImages", "True")


def _log_events(client: MlflowClient, tracked: TrackedRun, events: list[Event]) -> None:
    """Adds to the run's one list of events, a line each, in the order of steps; the same event is there once."""
    lines = {_event_line(event) for event in events}
    if any(file.path == EVENTS for file in client.list_artifacts(tracked.run_id)):
        with tempfile.TemporaryDirectory(prefix="esrgan-events-") as folder:
            there = client.download_artifacts(tracked.run_id, EVENTS, folder)
            lines |= set(Path(there).read_text(encoding="utf-8").splitlines())
    client.log_text(tracked.run_id, "\n".join(sorted(lines)) + "\n", EVENTS)
    client.set_tag(tracked.run_id, EVENTS_TAG, str(len(lines)))


def _event_line(event: Event) -> str:
    time = datetime.fromtimestamp(event.time_ms / 1000, UTC)
    text = " ".join(event.text.split())
    return f"step {event.step:8d}  {time:%Y-%m-%d %H:%M:%S}.{event.time_ms % 1000:03d} UTC  {text}"


def _key(key: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", key)[:250]
