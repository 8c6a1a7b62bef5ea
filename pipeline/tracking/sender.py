"""Background thread that sends the spool to MLflow; training never waits for it."""

import logging
import threading
import time
from collections.abc import Callable

from pipeline.run_folder import SENT, SentMark
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import cause
from pipeline.tracking.run import TrackedRun, open_described
from pipeline.tracking.spool import FOLDER, CorruptSegment, read_segment, segment_steps
from pipeline.tracking.upload import send_segment
from pipeline.tracking.uri import resolve_uri

MAX_PAUSE_S = 30.0

logger = logging.getLogger(__name__)


class Sender:
    """A thread that sends segments in order once their checkpoint is published; it runs as long as the block.

    If the server is unreachable it retries after 1 s, then after longer pauses of up to 30 s. Everything can be sent
    again without duplicates: points keep their step, time and value, images their names. `tracking/sent.json`, the
    last segment sent, therefore only saves work.

    Args:
        tracked: the open run; None if the server was unreachable at the start: the sender opens the run then.
        published_step: step of the newest published checkpoint; -1 without one.
        poll_s: seconds between two checks of the spool.
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
        self._enabled = config.enabled
        self._uri = tracked.uri if tracked else resolve_uri(config, run.uri.rpartition("/")[0])
        self._published_step = published_step
        self._poll_s = poll_s
        self._sent: int | None = None
        self._failing = False
        self._stop = False
        self._now = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="metrics-sender", daemon=True)

    def __enter__(self) -> "Sender":
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        # A request in progress ends by its own timeout. The thread is a daemon: it does not keep the process alive.
        if self._enabled:
            self._thread.join(timeout=20)

    def flush(self, timeout_s: float) -> int:
        """Sends all segments with a published checkpoint, retrying until they are sent or the time is over.

        Returns the number of segments not sent; 0 if tracking is disabled.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (self.tracked is None or self.pending()) and self._thread.is_alive():
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    break
                self._now = True
                self._changed.notify_all()
                self._changed.wait(timeout=min(1.0, remaining_s))
        return len(self.pending()) if self._enabled else 0

    def pending(self) -> list[int]:
        """Steps of the segments with a published checkpoint that are not sent yet."""
        sent, published = self._last_sent(), self._published_step()
        return [step for step in segment_steps(self.run) if sent < step <= published]

    def send_pending(self) -> int:
        """Sends them, on the calling thread; returns their number.

        Raises:
            TrackingUnreachable, MlflowException, OSError: the remaining segments are sent by the next call.
        """
        from mlflow import MlflowClient

        if self.tracked is None:
            self.tracked = open_described(self.run, self._uri)
        client = MlflowClient(self.tracked.uri, self.tracked.uri)
        count = 0
        for step in self.pending():
            if self._stop:
                break
            try:
                send_segment(client, self.tracked.run_id, read_segment(self.run, step), self._last_sent())
            except CorruptSegment as error:
                logger.warning("%s; skipped", error)
            self._mark_sent(step)
            count += 1
        return count

    def _work(self) -> None:
        pause_s = self._poll_s
        while not self._stop:
            try:
                self.send_pending()
                failing, pause_s = False, self._poll_s
            except Exception as error:  # noqa: BLE001 - training must not stop, and the spool keeps the segments
                failing, pause_s = True, min(MAX_PAUSE_S, max(1.0, 2 * pause_s))
                if not self._failing:
                    logger.warning("metrics are kept in %s: %s", self.run.path(FOLDER), cause(error))
            with self._changed:
                self._failing = failing
                self._changed.notify_all()
                min_pause_s = 1.0 if failing else 0.0  # Also while flush() waits.
                self._changed.wait_for(lambda: self._stop, timeout=min_pause_s)
                self._changed.wait_for(lambda: self._stop or self._now, timeout=pause_s - min_pause_s)
                self._now = False

    def _last_sent(self) -> int:
        """Step of the last segment sent to this MLflow run; -1 without one."""
        if self._sent is None:
            try:
                mark = SENT.read(self.run)
            except OSError:
                mark = None
            if mark is None or self.tracked is None or mark.run_id != self.tracked.run_id:
                return -1
            self._sent = mark.step
        return self._sent

    def _mark_sent(self, step: int) -> None:
        assert self.tracked is not None
        self._sent = step
        try:
            SENT.write(self.run, SentMark(self.tracked.run_id, step))
        except OSError as error:  # A full disk: the next process sends these segments again.
            logger.warning("%s not written: %s", self.run.path(SENT.path), cause(error))
