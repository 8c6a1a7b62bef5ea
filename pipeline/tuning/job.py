"""One job of a sweep: a trial, or the stage 1 that several trials share."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.run_folder import TrialOutcome, TrialPlan
from pipeline.storage import Storage
from pipeline.training.config import TrainConfig


@dataclass(frozen=True)
class Job:
    """What a process is to train."""

    name: str
    kind: Literal["trial", "stage 1"]
    config: TrainConfig
    """With the name and the storage of its run."""
    plan: TrialPlan
    stage_one: str = ""
    """Folder of the run of the trial's stage 1; empty: the trial trains it itself."""

    @property
    def run(self) -> Storage:
        """The run's folder."""
        return Storage(self.config.storage) / self.name

    @property
    def steps(self) -> int:
        """The last step."""
        return self.config.psnr.steps + self.config.gan.steps


def outcome_of(name: str, plan: TrialPlan, status: str, **details: Any) -> TrialOutcome:
    """The outcome of a job; `details` are further fields, without which it was not validated."""
    outcome = TrialOutcome(name, None, plan.values, status, 0, {}, number=plan.number, repeats=plan.repeats)
    return replace(outcome, **details)
