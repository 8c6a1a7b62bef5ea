"""The base of every section of the configuration."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed, frozen part of the configuration that refuses fields which it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
