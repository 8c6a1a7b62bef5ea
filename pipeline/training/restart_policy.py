"""Restart policy: what follows the failures of a run's worker groups. Pure functions of the recorded failures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.run_folder import Fault, Refusal

SAME_ERROR_ATTEMPTS = 3
DIVERGENCE_ATTEMPTS = 2

Action = Literal["retry", "continue", "give up"]


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
