"""Failures of worker groups, recorded in the run's folder since the run was last submitted."""

import time
from collections.abc import Sequence
from contextlib import suppress

from pipeline.run_folder import FAULTS, GROUP, Fault, FaultKind, WorkerGroup
from pipeline.storage import Storage


class Diverged(Exception):
    """Gradients stay non-finite. Retried once from the newest checkpoint; then the run fails with this message."""


class Refused(Exception):
    """Bad input that only a worker can see. Its message is in the run's folder; Ray Train ends all workers at once.

    A worker that ended without an exception would leave the others waiting in a collective: with NCCL on one machine
    they get no error.
    """


def record(run: Storage, step: int, kind: FaultKind, text: str) -> Fault:
    """Appends a failure. Raises OSError."""
    fault = Fault(step, kind, text, time.time_ns() // 1_000_000)
    FAULTS.write(run, [*load(run), fault])
    return fault


def load(run: Storage) -> list[Fault]:
    """The failures, the oldest first."""
    return FAULTS.read(run) or []


def clear(run: Storage) -> None:
    """Removes the record: a new submission has all its attempts again."""
    FAULTS.remove(run)
    GROUP.remove(run)


def restart_reason(run: Storage, faults: Sequence[Fault], workers: int) -> str:
    """Reason for this restart of a group of `workers` ("" for the first). Also records the group (side effect)."""
    previous = GROUP.read(run) or WorkerGroup(faults=0, workers=workers)
    with suppress(OSError):  # a full disk is handled by the checkpointer
        GROUP.write(run, WorkerGroup(len(faults), workers))
    if len(faults) > previous.faults:
        return f"after a fault ({faults[-1].text})"
    return f"in place of {previous.workers}" if previous.workers != workers else ""
