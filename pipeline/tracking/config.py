"""Configuration of tracking: the server, the experiment and the registered model."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_serializer

from pipeline.errors import is_installed, without_secrets
from pipeline.section import Section


def _registrable(name: str) -> str:
    """A name that MLflow registers and that models:/NAME@ALIAS can name; else ValueError."""
    if not 0 < len(name) <= 256 or name != name.strip() or any(sign in name for sign in "/:@'"):
        raise ValueError(f"{name!r} cannot be registered; use 1 to 256 characters without / : @ '")
    return name


class TrackingConfig(Section):
    """MLflow: the tracking server, the experiment and the registered model."""

    uri: str | None = Field(
        None,
        repr=False,
        description="MLflow tracking server: sqlite:////absolute/path.db or http(s)://host:port. "
        "Without one: mlflow.db next to the runs, in `storage`. `none`: no tracking server; the run's folder keeps the "
        "metrics, which send_metrics.py can send later. This is the default where MLflow is not installed.",
    )
    experiment: str = Field("esrgan", min_length=1, max_length=500, description="MLflow experiment.")
    model_name: Annotated[str, AfterValidator(_registrable)] = Field(
        "esrgan-x4", description="Registered model that receives the generator; without / : @ '."
    )
    if_unreachable: Literal["refuse", "spool"] = Field(
        "refuse",
        description="If the tracking server is unreachable at the start: refuse to start, or train and send "
        "metrics later.",
    )
    register_model: bool = Field(True, description="Register the best generator when the run ends.")

    @property
    def enabled(self) -> bool:
        """Whether metrics are sent to MLflow while training."""
        return self.uri != "none" and (self.uri is not None or is_installed("mlflow"))

    @field_serializer("uri", when_used="json")
    def _without_password(self, uri: str | None) -> str | None:
        """The URI as it is written to files and sent to workers, which need no tracking server."""
        return None if uri is None else without_secrets(uri)
