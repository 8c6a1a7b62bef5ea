"""Requests to the workers through files in the run's folder: to save and stop (SIGTERM), or to save before a resize."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.storage import Storage

FILE = "stop"
SAVE_FILE = "save"
# Default grace period of `ray job stop` (override: RAY_JOB_STOP_WAIT_TIME_S in the job's environment).
RAY_JOB_GRACE_S = 3.0
DEFAULT_GRACE_S = 30.0  # of Kubernetes and Slurm
MIN_GRACE_S = 10.0  # less does not suffice to end an interval and write a checkpoint
_SHUTDOWN_S = 5.0


class Stopped(Exception):
    """A run ended before its last step because a stop was requested; it resumes from the checkpoint that it saved."""


def request_stop(run: Storage) -> None:
    """Requests that the workers save and stop at the end of their interval. Raises OSError."""
    run.write_bytes(FILE, b"")


def end_stop_request(run: Storage) -> None:
    """Ends the request: the run may be started again."""
    run.remove(FILE)


def stop_requested(run: Storage) -> bool:
    """Whether a graceful stop was requested."""
    return run.exists(FILE)


def request_save(run: Storage) -> None:
    """Requests a checkpoint at the end of the workers' interval. Raises OSError."""
    run.write_bytes(SAVE_FILE, b"")


def save_requested(run: Storage) -> bool:
    """Whether a requested checkpoint is still to be written."""
    return run.exists(SAVE_FILE)


def end_save_request(run: Storage) -> None:
    """Ends the request: the checkpoint was written, or is no longer needed."""
    run.remove(SAVE_FILE)


def grace_s() -> float:
    """Seconds between SIGTERM and SIGKILL, as far as known."""
    set_by_user = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
    if set_by_user is not None:
        try:
            return float(set_by_user)
        except ValueError:
            return RAY_JOB_GRACE_S
    return RAY_JOB_GRACE_S if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else DEFAULT_GRACE_S


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
    run.remove(FILE)
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
        threading.Thread(target=request_stop, args=(run,), daemon=True).start()
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
        run.remove(FILE)
