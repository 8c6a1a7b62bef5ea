"""One job of a sweep: a trial, or the stage 1 that several trials share."""

from dataclasses import dataclass
from typing import Literal

from pipeline.run_folder import TrialPlan
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
