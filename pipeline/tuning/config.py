"""Configuration schema of a sweep."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.section import Section


class Uniform(Section):
    """Any number between two bounds."""

    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")
    log: bool = Field(False, description="Sample on a logarithmic scale.")

    @model_validator(mode="after")
    def _bounds(self) -> "Uniform":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low}, high={self.high}: need low < high, and low > 0 with log")
        return self


class Choice(Section):
    """One of a list of values."""

    choice: tuple[Annotated[float | str, Field(union_mode="left_to_right")], ...] = Field(
        min_length=1, description="The values to choose from."
    )


class TuneConfig(Section):
    """Ray Tune: search space, search algorithm, scheduler and metric."""

    name: str = Field(
        "tune",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the sweep and of its folder in `storage`; the same name again resumes it.",
    )
    trials: int = Field(8, ge=1, description="Number of trials.")
    max_concurrent: int = Field(1, ge=1, description="Maximum number of concurrent trials.")
    space: dict[str, Uniform | Choice] = Field(
        {
            "gan.pixel_weight": Uniform(low=1e-3, high=1.0, log=True),
            "gan.perceptual_weight": Uniform(low=0.1, high=10.0, log=True),
            "gan.adversarial_weight": Uniform(low=1e-4, high=5e-2, log=True),
            "model.residual_scale": Choice(choice=(0.1, 0.2, 0.4)),
        },
        min_length=1,
        description="Search space: fields of the training configuration, by dotted name.",
    )
    metric: str = Field(
        "psnr_y",
        description="Validation metric that ranks the trials: its value for the EMA weights at the final step.",
    )
    mode: Literal["max", "min"] = Field("max", description="Whether the metric is maximized or minimized.")
    search: Literal["random", "optuna"] = Field("random", description="Search algorithm.")
    scheduler: Literal["none", "asha"] = Field("none", description="asha: stop weak trials early.")
    grace_steps: int = Field(1, ge=1, description="asha: no trial is stopped before this step.")
    reduction_factor: int = Field(3, ge=2, description="asha: 1/N of the trials survive each rung.")
