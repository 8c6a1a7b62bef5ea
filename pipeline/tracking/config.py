"""Where runs are recorded and what the trained generator is called."""

from typing import Literal

from pydantic import Field

from pipeline.section import Section


class TrackingConfig(Section):
    """MLflow: the store, the experiment and the registered model."""

    uri: str | None = Field(
        None,
        description="MLflow tracking store: sqlite:////absolute/path.db or http(s)://host:port. "
        "Without one: mlflow.db beside the runs, in `storage`.",
    )
    experiment: str = Field("esrgan", min_length=1, description="MLflow experiment.")
    model_name: str = Field(
        "esrgan-x4", min_length=1, description="Registered model that receives the generator."
    )
    if_away: Literal["refuse", "spool"] = Field(
        "refuse",
        description="When the store cannot be reached at the start: refuse to begin, or train and send later.",
    )
    register_model: bool = Field(True, description="Register the best generator when the run ends.")
    metric: str = Field(
        "psnr_y", description="Validation metric that chooses the best generator and guards `champion`."
    )
