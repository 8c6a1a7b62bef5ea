"""Where runs are recorded and what the trained generator is called."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_serializer

from pipeline.errors import without_secrets
from pipeline.section import Section


def _registrable(name: str) -> str:
    """A name that MLflow registers and that models:/NAME@ALIAS can name; else ValueError."""
    if not 0 < len(name) <= 256 or name != name.strip() or any(sign in name for sign in "/:@'"):
        raise ValueError(f"{name!r} cannot be registered; use 1 to 256 characters without / : @ '")
    return name


class TrackingConfig(Section):
    """MLflow: the store, the experiment and the registered model."""

    uri: str | None = Field(
        None,
        repr=False,
        description="MLflow tracking store: sqlite:////absolute/path.db or http(s)://host:port. "
        "Without one: mlflow.db beside the runs, in `storage`.",
    )
    experiment: str = Field("esrgan", min_length=1, max_length=500, description="MLflow experiment.")
    model_name: Annotated[str, AfterValidator(_registrable)] = Field(
        "esrgan-x4", description="Registered model that receives the generator; without / : @ '."
    )
    if_away: Literal["refuse", "spool"] = Field(
        "refuse",
        description="When the store cannot be reached at the start: refuse to begin, or train and send later.",
    )
    register_model: bool = Field(True, description="Register the best generator when the run ends.")
    metric: str = Field(
        "psnr_y", description="Validation metric that chooses the best generator and guards `champion`."
    )

    @field_serializer("uri", when_used="json")
    def _without_password(self, uri: str | None) -> str | None:
        """What is written to a file or sent to a worker: training on a worker does not need the store."""
        return None if uri is None else without_secrets(uri)
