"""Failures of worker groups, recorded in the run's folder since the run was last submitted, and what follows them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from pipeline.run_folder import FAULTS, GROUP, Fault, FaultKind, Refusal, WorkerGroup
from pipeline.storage import Storage
from pipeline.tracking.spool import now_ms

SAME_ERROR_ATTEMPTS = 3
DIVERGENCE_ATTEMPTS = 2

Action = Literal["retry", "continue", "give up"]


class Diverged(Exception):
    """Gradients stay non-finite. Retried once from the newest checkpoint; then the run fails with this message."""


class OutOfMemory(Exception):
    """A GPU has too little memory. Treated as Diverged is: a retry helps only if another process used the memory."""


class Refused(Exception):
    """Bad input that only a worker can see. Its message is in the run's folder; Ray Train ends all workers at once.

    A worker that ended without an exception would leave the others waiting in a collective: with NCCL on one machine
    they get no error.
    """


def record(run: Storage, step: int, kind: FaultKind, text: str) -> Fault:
    """Appends a failure. Raises OSError."""
    fault = Fault(step, kind, text, now_ms())
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


@dataclass(frozen=True)
class Decision:
    """What a run does next."""

    action: Action
    """Start another worker group at the newest checkpoint; conclude the run; or end it with `reason`."""
    reason: str = ""
    user_error: bool = False
    """Whether the user can fix the reason (exit code 2), or it is a failure (a traceback)."""


@dataclass(frozen=True)
class RestartPolicy:
    """When a run is restarted and when it ends."""

    max_restarts: int
    """Failures without a new checkpoint in between that are retried (`faults.max_restarts`)."""

    def decide(self, faults: Sequence[Fault], refusal: Refusal | None = None, done: bool = False) -> Decision:
        """What follows.

        A refusal (bad input that only a worker can see) is never retried. Failures count since the newest checkpoint,
        so a run that makes progress may be restarted any number of times. Without progress, a divergence is retried
        once, the same error twice, and a process that died `max_restarts` times.

        Args:
            faults: failures since the run was submitted, the oldest first.
            refusal: why a worker stopped for good.
            done: whether the workers ended without a failure.
        """
        if refusal is not None:
            return Decision("give up", refusal.message, user_error=True)
        if faults:
            last = faults[-1]
            recent = [fault for fault in faults if fault.step == last.step]
            same = sum(fault.text == last.text for fault in recent)
            since = f"since step {max(last.step, 0)}"
            if last.kind == "diverged" and same >= DIVERGENCE_ATTEMPTS:
                return Decision("give up", last.text, user_error=True)
            if last.kind == "error" and same >= SAME_ERROR_ATTEMPTS:
                return Decision("give up", f"the same error {same} times {since}: {last.text}")
            if len(recent) > self.max_restarts:
                return Decision(
                    "give up",
                    f"{len(recent)} faults {since} without a new checkpoint "
                    f"(faults.max_restarts={self.max_restarts}); the last: {last.text}",
                    user_error=last.kind == "diverged",
                )
        return Decision("continue" if done else "retry")
