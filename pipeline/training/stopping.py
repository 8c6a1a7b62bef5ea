"""Requests to the workers through files in the run's folder: to save and end (SIGTERM), or to save before a resize."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.storage import Storage

FILE = "stop"
SAVE_FILE = "save"
# `ray job stop` waits so long, unless RAY_JOB_STOP_WAIT_TIME_S is in the job's environment.
RAY_JOB_GRACE_S = 3.0
USUAL_GRACE_S = 30.0  # What Kubernetes and Slurm give.
LEAST_GRACE_S = 10.0  # Less is not enough to end an interval and write a checkpoint.
_LEFT_FOR_THE_END_S = 5.0


def stop_requested(run: Storage) -> bool:
    """Whether the run was asked to save and end."""
    return run.exists(FILE)


def request_save(run: Storage) -> None:
    """Requests a checkpoint at the end of the workers' interval. Raises OSError."""
    run.write_bytes(SAVE_FILE, b"")


def save_requested(run: Storage) -> bool:
    """Whether a requested checkpoint has not been written yet."""
    return run.exists(SAVE_FILE)


def end_save_request(run: Storage) -> None:
    """The checkpoint has been written, or is not needed anymore."""
    run.remove(SAVE_FILE)


def grace_s() -> float:
    """Seconds between SIGTERM and SIGKILL, as far as they can be known."""
    set_by_user = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
    if set_by_user is not None:
        try:
            return float(set_by_user)
        except ValueError:
            return RAY_JOB_GRACE_S
    return RAY_JOB_GRACE_S if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else USUAL_GRACE_S


@contextmanager
def saving_on_sigterm(run: Storage) -> Iterator[None]:
    """Inside, SIGTERM makes the workers save and end, as far as the grace time allows.

    The block then ends with SystemExit: when the workers have saved, when the grace time is nearly over, at a second
    SIGTERM, or at once where the grace time is too short for a checkpoint. Nothing is lost but the steps since the
    newest checkpoint. Outside of the main thread (a trial's driver) signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    run.remove(FILE)
    asked = threading.Event()
    code = 128 + signal.SIGTERM

    def end(number: int, frame: object) -> None:
        raise SystemExit(code)

    def ask(number: int, frame: object) -> None:
        seconds = grace_s()
        if asked.is_set() or seconds < LEAST_GRACE_S:
            raise SystemExit(code)
        asked.set()
        print(f"SIGTERM: saving, then ending (within {seconds:.0f} s)", flush=True)
        # Storage takes locks, which a signal handler must not wait for.
        threading.Thread(target=run.write_bytes, args=(FILE, b""), daemon=True).start()
        signal.setitimer(signal.ITIMER_REAL, seconds - _LEFT_FOR_THE_END_S)

    before = signal.signal(signal.SIGTERM, ask), signal.signal(signal.SIGALRM, end)
    try:
        yield
        if asked.is_set():
            raise SystemExit(code)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])
        run.remove(FILE)
