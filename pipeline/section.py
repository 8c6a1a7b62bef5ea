"""The base of every section of the configuration, and its fields by dotted names."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed, frozen part of the configuration that refuses unknown fields and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def flat_fields(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as {"gan.steps": 1000, ...}; empty sections vanish."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flat_fields(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
