"""The base of every section of the configuration: validation with one-line errors, and fields by dotted names."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import UserError

# Old to new name of a field; the message about the old one contains the new one.
RENAMED = {
    "data.licence": "data.license",
    "data.max_damaged_share": "data.max_corrupt_share",
    "data.patch_step_px": "data.patch_stride_px",
    "tune.metric": "tune.metrics (a list)",
    "tune.mode": "tune.modes (a list)",
    "tracking.if_away": "tracking.if_unreachable",
    "tracking.metric": "gan.select_by (psnr.select_by for stage 1)",
}


class Section(BaseModel):
    """A typed, frozen part of the configuration that rejects unknown fields and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=BaseModel)


def flat_fields(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as {"gan.steps": 1000, ...}; empty sections are dropped."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flat_fields(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], shown: Callable[[Any], str] = repr
) -> list[str]:
    """What differs between two flat mappings, as `name was A, now B`, sorted by name; a missing value is None."""
    return [
        f"{name} was {shown(before.get(name))}, now {shown(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def merged(
    section: type[BaseModel] | None, base: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Nested values of `base`, replaced by those of `overrides`.

    Sections are merged field by field. A field whose value is a mapping (`perceptual.layers`, `tune.space`) is replaced
    as a whole: its keys are part of the value. Without a `section`, the class of the values, every mapping is a value.
    """
    result = dict(base)
    for name, value in overrides.items():
        old, inner = result.get(name), _section_at(section, name)
        nested = inner is not None and isinstance(old, Mapping) and isinstance(value, Mapping)
        result[name] = merged(inner, old, value) if nested else value  # type: ignore[arg-type]
    return result


def with_fields(config: AnySection, changes: Mapping[str, Any]) -> AnySection:
    """A copy of `config` with dotted fields changed, validated again. Raises UserError."""
    values = config.model_dump()
    for name, value in changes.items():
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = merged(type(config), values, nested)
    return validated(type(config), values)


def validated(
    section: type[AnySection],
    values: Mapping[str, Any],
    sources: Sequence[tuple[str, Mapping[str, Any]]] = (),
    flags: Mapping[str, str] | None = None,
) -> AnySection:
    """A section from plain values.

    Args:
        section: its class.
        values: nested values.
        sources: name and values of each origin of `values`, in order of precedence.
        flags: what errors call a field, if it is not its dotted name.

    Raises:
        UserError: the first error in one line: the field, its value and its source.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(section, error, sources, flags or {})) from None


def _explain(
    section: type[BaseModel],
    error: ValidationError,
    sources: Sequence[tuple[str, Mapping[str, Any]]],
    flags: Mapping[str, str],
) -> str:
    details = error.errors()
    # A union reports every alternative; the first error's field is enough.
    first = details[0]
    path = [str(part) for part in first["loc"]]
    field, model = _field_path(section, path)
    origin = next((name for name, values in sources if _holds(values, path) or _holds(values, field)), "")
    where = {"": "", "flag": "", "environment": "environment: "}.get(origin, f"{origin}: ")
    name = ".".join(field)
    name = flags.get(name, name)
    more = f" (and {len(details) - 1} more)" if len({d["loc"][: len(field)] for d in details}) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(model.model_fields) if model else []
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        if ".".join(path) in RENAMED:
            hint = f"renamed to {RENAMED['.'.join(path)]}"
        return f"{where}{'.'.join(path)}: no such field; {hint}{more}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{where}{name}: {message}{more}" if name else f"{where}{message}{more}"
    if first["type"] == "missing":
        return f"{where}{name}: missing{more}"
    message = str(first["msg"]).removeprefix("Input ")
    return f"{where}{name}={first['input']!r}: {message[0].lower()}{message[1:]}{more}"


def _field_path(section: type[BaseModel], path: Sequence[str]) -> tuple[list[str], type[BaseModel] | None]:
    """The part of an error's location that names fields, and the section that holds the last one."""
    model: type[BaseModel] | None = section
    field: list[str] = []
    for part in path:
        if model is None or part not in model.model_fields:
            break
        field.append(part)
        model = _section_at(model, part)
    return field, model


def _section_at(section: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The class of the section's field `name`, if that is a section itself."""
    if section is None or name not in section.model_fields:
        return None
    annotation = section.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _holds(values: Any, field: Sequence[str]) -> bool:
    for part in field:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return bool(field)
