"""Requests to the workers through files in the run's folder: to save and stop (SIGTERM), or to save before a resize."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.storage import Storage

# Default grace period of `ray job stop` (override: RAY_JOB_STOP_WAIT_TIME_S in the job's environment).
RAY_JOB_GRACE_S = 3.0
DEFAULT_GRACE_S = 30.0  # of Kubernetes and Slurm
MIN_GRACE_S = 10.0  # less does not suffice to end an interval and write a checkpoint
_SHUTDOWN_S = 5.0


class Stopped(Exception):
    """A run ended before its last step because a stop was requested; it resumes from the checkpoint that it saved."""


@dataclass(frozen=True)
class Request:
    """A request to the workers of a run, which see it at the end of an interval."""

    file: str
    """Present in the run's folder while the request is open."""

    def make(self, run: Storage) -> None:
        """Raises OSError."""
        run.write_bytes(self.file, b"")

    def is_open(self, run: Storage) -> bool:
        """Whether it was made and has not ended."""
        return run.exists(self.file)

    def end(self, run: Storage) -> None:
        """Ends the request: it was met, or is no longer needed."""
        run.remove(self.file)


STOP = Request("stop")
"""To save and stop."""
SAVE = Request("save")
"""To save a checkpoint before the worker group is resized."""


def grace_s() -> float:
    """Seconds between SIGTERM and SIGKILL, as far as known."""
    try:
        return float(os.environ["RAY_JOB_STOP_WAIT_TIME_S"])
    except KeyError:
        return RAY_JOB_GRACE_S if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else DEFAULT_GRACE_S
    except ValueError:
        return RAY_JOB_GRACE_S


@contextmanager
def saving_on_sigterm(run: Storage) -> Iterator[None]:
    """Inside the block, SIGTERM makes the workers save and stop, if the grace period allows.

    The block then raises SystemExit: when the workers have saved, shortly before the grace period ends, at a second
    SIGTERM, or at once if the grace period is too short for a checkpoint. At most the steps since the newest checkpoint
    are lost. Does nothing outside the main thread (a trial's driver).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    STOP.end(run)
    requested = threading.Event()
    code = 128 + signal.SIGTERM

    def end(number: int, frame: object) -> None:
        raise SystemExit(code)

    def request(number: int, frame: object) -> None:
        seconds = grace_s()
        if requested.is_set() or seconds < MIN_GRACE_S:
            raise SystemExit(code)
        requested.set()
        print(f"SIGTERM: saving, then stopping (within {seconds:.0f} s)", flush=True)
        # In a thread: storage takes locks, which a signal handler must not wait for.
        threading.Thread(target=STOP.make, args=(run,), daemon=True).start()
        signal.setitimer(signal.ITIMER_REAL, seconds - _SHUTDOWN_S)

    before = signal.signal(signal.SIGTERM, request), signal.signal(signal.SIGALRM, end)
    try:
        yield
        if requested.is_set():
            raise SystemExit(code)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])
        STOP.end(run)
