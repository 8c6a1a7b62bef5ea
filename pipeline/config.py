"""Loads the configuration: one file, the environment, dotted flags, in ascending order of precedence."""

import argparse
import difflib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pipeline.command import COMMAND_SECTIONS, ENV_PREFIX, make_parser
from pipeline.errors import UserError
from pipeline.section import flat_fields, merged, validated
from pipeline.short_help import ALL, FIRST_FIELDS, SHORT, print_short_help
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import TuneConfig


class Config(TrainConfig):
    """All fields of all commands; each command reads its own sections."""

    tune: TuneConfig = Field(TuneConfig(), description="The sweep.")


class _Settings(Config, BaseSettings):
    """The same fields with pydantic-settings' flags and environment."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", case_sensitive=False, cli_avoid_json=True
    )


def load_config(
    argv: Sequence[str],
    *,
    description: str,
    default_file: Path | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], object] | None = None,
    environment: Mapping[str, str] | None = None,
    first_fields: Sequence[str] = FIRST_FIELDS,
) -> tuple[Config, argparse.Namespace]:
    """Reads flags, environment and file into one validated configuration.

    Args:
        argv: arguments without the program's name.
        description: first paragraph of --help.
        default_file: read when --config is not given.
        add_arguments: adds the command's own flags (such as --json).
        environment: instead of os.environ.
        first_fields: those that --help lists; --help-all lists all.

    Returns:
        The configuration, and the command's own flags. Among these, `prepare_command` is None if a missing data set
        may be prepared; otherwise it is the command line that would prepare it, for the user to confirm.

    Raises:
        UserError: one line with the field, its value and its source.
    """
    environment = os.environ if environment is None else environment
    parser = make_parser(description)
    parser.usage = "%(prog)s [--config FILE] [--FIELD VALUE ...]"
    default_text = f" (default: {default_file.name})" if default_file else ""
    parser.add_argument("--config", metavar="FILE", help=f"YAML file with the fields below{default_text}.")
    if add_arguments:
        add_arguments(parser)
    if any(word in SHORT for word in argv):
        print_short_help(parser, _without_flags(argv, default_file, environment), first_fields)
        sys.exit(0)
    argv = ["--help" if word == ALL else word for word in argv]
    try:
        flags: CliSettingsSource[Any] = CliSettingsSource(
            _Settings,
            root_parser=parser,
            parse_args_method=_parse_args,
            cli_parse_args=list(argv),
            cli_hide_none_type=True,
        )
    except SettingsError as error:  # a flag of a list or mapping
        field = str(error).removeprefix("Parsing error encountered for ").partition(":")[0]
        raise UserError(
            f"--{field}: not JSON; write a list as [1, 2] and a mapping as '{{\"KEY\": VALUE}}' or KEY=VALUE"
        ) from None
    options = parser.parse_args(list(argv))
    chosen = Path(options.config) if options.config else default_file
    sources: list[tuple[str, dict[str, Any]]] = [
        ("flag", flags()),
        ("environment", _environment_values(environment)),
        (str(chosen), _file_values(chosen) if chosen else {}),
    ]
    values: dict[str, Any] = {}
    for _, overrides in reversed(sources):
        values = merged(Config, values, overrides)
    config = validated(Config, values, sources)
    given = flat_fields(merged(Config, sources[1][1], sources[0][1]))
    options.given = given
    options.prepare_command = _prepare_command(config, given, chosen)
    return config, options


def _without_flags(argv: Sequence[str], default_file: Path | None, environment: Mapping[str, str]) -> Config:
    """The configuration of the file and the environment, for the values that --help shows."""
    known = make_parser("")
    known.add_argument("--config")
    name = known.parse_known_args([word for word in argv if word not in SHORT])[0].config
    file = Path(name) if name else default_file
    sources: list[tuple[str, dict[str, Any]]] = [
        ("environment", _environment_values(environment)),
        (str(file), _file_values(file) if file else {}),
    ]
    return validated(Config, merged(Config, sources[1][1], sources[0][1]), sources)


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration file, for editors."""
    return Config.model_json_schema()


def _prepare_command(config: Config, given: Mapping[str, Any], file: Path | None) -> str | None:
    """The command that prepares a data set at a data.root given by flag or environment, from the file's data.source.

    A mistyped root must not be filled with the images of the file's data.source. None if both come from the file, or
    both from the user.
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
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: contains a {type(values).__name__}; expected fields such as `run_name: demo`"
        )
    return values


def _environment_values(environment: Mapping[str, str]) -> dict[str, Any]:
    for name in environment:
        if name.upper().startswith(ENV_PREFIX):
            field = name[len(ENV_PREFIX) :].split("__")[0].lower()
            if field not in Config.model_fields and field not in COMMAND_SECTIONS:
                near = difflib.get_close_matches(field, Config.model_fields, n=1)
                hint = f"did you mean {ENV_PREFIX}{near[0].upper()}?" if near else "unset it"
                raise UserError(f"environment {name}: no field {field}; {hint}")
    source = EnvSettingsSource(_Settings)
    source.env_vars = {name.lower(): value for name, value in environment.items()}
    try:
        return source()
    except SettingsError as error:  # a value that should have been JSON
        raise UserError(f"environment: {str(error).splitlines()[0]}") from None


def fields_page() -> str:
    """All fields as a Markdown page: name, type or choices, default, help."""
    lines = [
        "# Configuration fields",
        "",
        "Set a field by a flag (`--gan.steps 1000`), the environment (`ESRGAN_GAN__STEPS=1000`) or the file",
        "(`gan: {steps: 1000}`), in descending order of precedence. This page is generated:",
        "`python -m pipeline.config --page > docs/fields.md`.",
        "",
        "| field | default | description |",
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
