"""Why groups of workers stopped: kept in the run's folder, so that a fault which repeats ends the run."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.storage import Storage

FILE = "faults.json"
GROUP_FILE = "group.json"
SAME_ERROR_TRIES = 3

Kind = Literal["died", "error", "diverged"]


class Diverged(Exception):
    """Gradients stay non-finite. The newest checkpoint is tried once more; then it is the user's to mend."""


@dataclass(frozen=True)
class Fault:
    """One stop of the group of workers."""

    step: int
    """Step of the newest checkpoint at that time; -1 without one."""
    kind: Kind
    """A worker's process ended, the training raised an error, or its gradients were not finite."""
    text: str
    time_ms: int


def note(run: Storage, step: int, kind: Kind, text: str) -> Fault:
    """Adds a fault to the run's folder. Raises OSError."""
    fault = Fault(step, kind, text, time.time_ns() // 1_000_000)
    content = json.dumps([asdict(each) for each in [*load(run), fault]], indent=2, ensure_ascii=False)
    run.write_bytes(FILE, content.encode())
    return fault


def load(run: Storage) -> list[Fault]:
    """The faults since the run was submitted, the oldest first."""
    try:
        return [Fault(**each) for each in json.loads(run.read_bytes(FILE))]
    except (FileNotFoundError, ValueError, TypeError):
        return []


def clear(run: Storage) -> None:
    """Forgets them: a new submission has all its tries again."""
    run.remove(FILE)
    run.remove(GROUP_FILE)


def why_again(run: Storage, noted: Sequence[Fault], workers: int) -> str:
    """Why a group of workers follows another one since the run was submitted; empty for the first.

    One worker of every group calls it once, with the faults so far: it also notes the group for the next one's
    question.
    """
    try:
        before = json.loads(run.read_bytes(GROUP_FILE))
        faults_before, workers_before = int(before["faults"]), int(before["workers"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        faults_before, workers_before = 0, workers
    with suppress(OSError):  # a full disk is for the checkpoints to deal with
        run.write_bytes(GROUP_FILE, json.dumps({"faults": len(noted), "workers": workers}).encode())
    if len(noted) > faults_before:
        return f"after a fault ({noted[-1].text})"
    return f"in place of {workers_before}" if workers_before != workers else ""


def verdict(faults: Sequence[Fault], max_restarts: int) -> str | None:
    """Why the run must not be started again after these faults; None: it may.

    Faults count from the newest checkpoint on: a run that gets on may be interrupted any number of times. Processes
    that die may do so `max_restarts` times. The same error three times, or the same divergence twice, will come again.
    """
    if not faults:
        return None
    last = faults[-1]
    since = [fault for fault in faults if fault.step == last.step]
    place = f"from step {max(last.step, 0)} on"
    if last.kind == "diverged" and sum(fault.text == last.text for fault in since) > 1:
        return last.text
    same = sum(fault.text == last.text for fault in since)
    if last.kind == "error" and same >= SAME_ERROR_TRIES:
        return f"the same error {same} times {place}: {last.text}"
    if len(since) > max_restarts:
        return (
            f"{len(since)} faults {place} without a new checkpoint "
            f"(faults.max_restarts={max_restarts}); the last: {last.text}"
        )
    return None
