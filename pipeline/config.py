"""Loads the configuration: one file, then the environment, then dotted flags; each later one wins."""

import argparse
import difflib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsConfigDict

from pipeline.errors import UserError
from pipeline.section import flat_fields
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import TuneConfig

ENV_PREFIX = "ESRGAN_"
# Old to new name; the old one is refused with a message that has the new one.
RENAMED = {
    "data.licence": "data.license",
    "data.max_damaged_share": "data.max_corrupt_share",
    "data.patch_step_px": "data.patch_stride_px",
    "tracking.if_away": "tracking.if_unreachable",
}


class Config(TrainConfig):
    """All fields of all commands; each command reads its own sections."""

    tune: TuneConfig = Field(TuneConfig(), description="The sweep.")


class _Settings(Config, BaseSettings):
    """The same fields with pydantic-settings' flags and environment."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", case_sensitive=False, cli_avoid_json=True
    )


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if "unrecognized arguments:" in message:
            flag = message.split("unrecognized arguments:")[1].split()[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
            if flag.removeprefix("--") in RENAMED:
                hint = f"; renamed to --{RENAMED[flag.removeprefix('--')]}"
        raise UserError(f"{message}{hint}")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser for a command without configuration fields; its errors are one line (UserError)."""
    return _Parser(description=description, allow_abbrev=False)


def load_config(
    argv: Sequence[str],
    *,
    description: str,
    default_file: Path | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Reads flags, environment and file into one validated configuration.

    Args:
        argv: arguments without the program's name.
        description: first line of --help.
        default_file: read when --config is not given.
        add_arguments: adds the command's own flags (such as --json).
        environment: instead of os.environ.

    Returns:
        The configuration, and the command's own flags. Among these, `prepare_command` is None where a missing data
        set may be prepared; otherwise it is the command line that would prepare it, for the user to confirm.

    Raises:
        UserError: one line that names the field, its value and where it was set.
    """
    environment = os.environ if environment is None else environment
    parser = make_parser(description)
    default_text = f" (default: {default_file.name})" if default_file else ""
    parser.add_argument("--config", metavar="FILE", help=f"YAML file with the fields below{default_text}.")
    if add_arguments:
        add_arguments(parser)
    flags: CliSettingsSource[Any] = CliSettingsSource(
        _Settings,
        root_parser=parser,
        parse_args_method=_parse_args,
        cli_parse_args=list(argv),
        cli_hide_none_type=True,
    )
    options = parser.parse_args(list(argv))
    chosen = Path(options.config) if options.config else default_file
    sources: list[tuple[str, dict[str, Any]]] = [
        ("flag", flags()),
        ("environment", _environment_values(environment)),
        (str(chosen), _file_values(chosen) if chosen else {}),
    ]
    merged: dict[str, Any] = {}
    for _, values in reversed(sources):
        merged = _merge(merged, values)
    config = validate(merged, sources)
    given = flat_fields(_merge(sources[1][1], sources[0][1]))
    options.prepare_command = _prepare_command(config, given, chosen)
    return config, options


def validate(values: Mapping[str, Any], sources: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> Config:
    """A configuration from plain values. Raises UserError naming the field, its value and its source."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, sources)) from None


def with_fields(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of `config` with dotted fields changed, validated again. Raises UserError."""
    nested: dict[str, Any] = {}
    for name, value in changes.items():
        *sections, field = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return validate(_merge(config.model_dump(), nested), [("change", nested)])


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration file, for editors."""
    return Config.model_json_schema()


def _prepare_command(config: Config, given: Mapping[str, Any], file: Path | None) -> str | None:
    """The command that prepares a data set at a data.root given by flag or environment, from the file's data.source.

    A mistyped root must not be filled with whatever images the file happens to name. None where the same place, or
    the user, decides both.
    """
    if "data.root" not in given or "data.source" in given or config.data.source is None:
        return None
    words = ["python", "jobs/prepare_data.py", *(["--config", str(file)] if file else [])]
    for name, value in given.items():
        if name.startswith("data."):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _parse_args(
    parser: argparse.ArgumentParser, args: Sequence[str], namespace: Any = None
) -> argparse.Namespace:
    return parser.parse_args(args, namespace)


def _file_values(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}; expected fields such as `run_name: demo`")
    return values


def _environment_values(environment: Mapping[str, str]) -> dict[str, Any]:
    known = set(Config.model_fields)
    for name in environment:
        if name.upper().startswith(ENV_PREFIX):
            field = name[len(ENV_PREFIX) :].split("__")[0].lower()
            if field not in known:
                near = difflib.get_close_matches(field, known, n=1)
                hint = f"did you mean {ENV_PREFIX}{near[0].upper()}?" if near else "unset it"
                raise UserError(f"environment {name}: there is no field {field}; {hint}")
    source = EnvSettingsSource(_Settings)
    source.env_vars = {name.lower(): value for name, value in environment.items()}
    try:
        return source()
    except ValueError as error:  # pydantic-settings' SettingsError: a value that should have been JSON
        raise UserError(f"environment: {str(error).splitlines()[0]}") from None


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = (
            _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def _explain(error: ValidationError, sources: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The first mistake, in one line."""
    details = error.errors()
    # A union reports every alternative; the first error's field is enough.
    first = details[0]
    path = [str(part) for part in first["loc"]]
    field, model = _field_path(path)
    origin = next((name for name, values in sources if _holds(values, field)), "")
    where = {"": "", "flag": "", "environment": "environment: ", "change": ""}.get(origin, f"{origin}: ")
    name = ".".join(field)
    more = f" (and {len(details) - 1} more)" if len({d["loc"][: len(field)] for d in details}) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(model.model_fields) if model else []
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        if ".".join(path) in RENAMED:
            hint = f"renamed to {RENAMED['.'.join(path)]}"
        return f"{where}{'.'.join(path)}: there is no such field; {hint}{more}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{where}{name}: {message}{more}" if name else f"{where}{message}{more}"
    return f"{where}{name}={first['input']!r}: {_plain(first)}{more}"


def _plain(detail: Any) -> str:
    message = str(detail["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _field_path(path: Sequence[str]) -> tuple[list[str], type[BaseModel] | None]:
    """The part of an error's location that names fields, and the section that holds the last one."""
    model: type[BaseModel] | None = Config
    field: list[str] = []
    for part in path:
        if model is None or part not in model.model_fields:
            break
        field.append(part)
        annotation = model.model_fields[part].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return field, model


def _holds(values: Mapping[str, Any], field: Sequence[str]) -> bool:
    place: Any = values
    for part in field:
        if not isinstance(place, Mapping) or part not in place:
            return False
        place = place[part]
    return bool(field)


def fields_page() -> str:
    """All fields as a Markdown page: name, type or choices, default, help."""
    lines = [
        "# Configuration fields",
        "",
        "Set a field by a flag (`--gan.steps 1000`), the environment (`ESRGAN_GAN__STEPS=1000`) or the file",
        "(`gan: {steps: 1000}`); the first of these that is there wins. This page is generated:",
        "`python -m pipeline.config --page > docs/fields.md`.",
        "",
        "| field | default | what it does |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | `{default}` | {text} |" for name, default, text in _described(Config(), "")]
    return "\n".join(lines) + "\n"


def _described(section: BaseModel, prefix: str) -> list[tuple[str, str, str]]:
    """Fields of a section, with the defaults that this use of it has."""
    rows = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            rows += _described(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, _shown(value), field.description or ""))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = {
            key: item.model_dump() if isinstance(item, BaseModel) else item for key, item in value.items()
        }
    return json.dumps(value, default=list)


if __name__ == "__main__":
    print(fields_page() if "--page" in sys.argv else json.dumps(json_schema(), indent=2), end="")
