"""Loads the configuration: one file, the environment, dotted flags, in ascending order of precedence; describes it."""

import argparse
import difflib
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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

from pipeline.command import COMMAND_SECTIONS, ENV_PREFIX, make_parser, require_writable_file
from pipeline.errors import UserError, without_secrets
from pipeline.section import flat_fields, merged, validated
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import TuneConfig

FIRST_FIELDS = (
    "run_name",
    "storage",
    "data.source",
    "data.held_out",
    "data.root",
    "workers",
    "use_gpu",
    "batch_size",
    "psnr.steps",
    "gan.steps",
    "tracking.uri",
)
HELP, HELP_ALL = ("-h", "--help"), "--help-all"


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
    own_flags: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    environment: Mapping[str, str] | None = None,
    first_fields: Sequence[str] = FIRST_FIELDS,
) -> tuple[Config, argparse.Namespace]:
    """Reads flags, environment and file into one validated configuration.

    Args:
        argv: arguments without the program's name.
        description: first paragraph of --help.
        default_file: read when --config is not given.
        own_flags: the command's own flags, with their arguments of argparse.
        environment: instead of os.environ.
        first_fields: those that --help lists; --help-all lists all.

    Returns:
        The configuration, and the command's own flags. Among these, `json` is a file that can be written, or None;
        `prepare_command` is None if a missing data set may be prepared; otherwise it is the command line that would
        prepare it, for the user to confirm.

    Raises:
        UserError: one line with the field, its value and its source.
    """
    environment = os.environ if environment is None else environment
    parser = make_parser(description)
    parser.usage = "%(prog)s [--config FILE] [--FIELD VALUE ...]"
    default_text = f" (default: {default_file.name})" if default_file else ""
    parser.add_argument("--config", metavar="FILE", help=f"YAML file with the fields below{default_text}.")
    parser.add_argument("--json", metavar="FILE", help="Also write the result to this file.")
    for flag, arguments in own_flags.items():
        parser.add_argument(flag, **arguments)
    file = _config_file(argv) or default_file
    sources: list[tuple[str, dict[str, Any]]] = [
        ("environment", _environment_values(environment)),
        (str(file), _file_values(file) if file else {}),
    ]
    values = merged(Config, sources[1][1], sources[0][1])
    if any(word in HELP for word in argv):
        _print_help(parser, validated(Config, values, sources), first_fields)
        sys.exit(0)
    argv = ["--help" if word == HELP_ALL else word for word in argv]
    try:
        flags: CliSettingsSource[Any] = CliSettingsSource(
            _Settings,
            root_parser=parser,
            parse_args_method=argparse.ArgumentParser.parse_args,
            cli_parse_args=argv,
            cli_hide_none_type=True,
        )
    except SettingsError as error:  # a flag of a list or mapping
        field = str(error).removeprefix("Parsing error encountered for ").partition(":")[0]
        raise UserError(
            f"--{field}: not JSON; write a list as [1, 2] and a mapping as '{{\"KEY\": VALUE}}' or KEY=VALUE"
        ) from None
    sources.insert(0, ("flag", flags()))
    config = validated(Config, merged(Config, values, sources[0][1]), sources)
    options = parser.parse_args(argv)
    options.given = flat_fields(merged(Config, sources[1][1], sources[0][1]))
    options.prepare_command = _prepare_command(config, options.given, file)
    require_writable_file(options.json, "--json")
    return config, options


def _config_file(argv: Sequence[str]) -> Path | None:
    """The file of --config, before the other flags are parsed."""
    parser = make_parser("")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args([word for word in argv if word not in HELP])
    return Path(known.config) if known.config else None


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


def _print_help(parser: argparse.ArgumentParser, config: Config, fields: Sequence[str]) -> None:
    """Prints the command's own flags, `fields` with the values that apply without flags, and the sections' names."""
    described = _described(config, "")
    group = parser.add_argument_group("fields that most runs set")
    for name in fields:
        value, description = described[name]
        first_sentence = description.partition(". ")[0].removesuffix(".")
        shown = "" if value is None else f" (now: {without_secrets(str(value))})"
        group.add_argument(f"--{name}", metavar="X", help=f"{first_sentence}{shown}.".replace("%", "%%"))
    counts = Counter(name.rpartition(".")[0].partition(".")[0] for name in described)
    plain = counts.pop("")
    sections = ", ".join(f"{name}.* ({count})" for name, count in counts.items())
    parser.epilog = (
        f"All fields: {plain} without a section, {sections}. {HELP_ALL} lists them, docs/fields.md describes them; "
        "each is also a field of the file."
    )
    parser.print_help()


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
    for name, (value, text) in _described(Config(), "").items():
        if isinstance(value, dict):
            value = {
                key: each.model_dump() if isinstance(each, BaseModel) else each for key, each in value.items()
            }
        lines.append(f"| `{name}` | `{json.dumps(value, default=list)}` | {text} |")
    return "\n".join(lines) + "\n"


def _described(section: BaseModel, prefix: str) -> dict[str, tuple[Any, str]]:
    """All fields of a section by dotted name: value and description."""
    fields: dict[str, tuple[Any, str]] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            fields |= _described(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value, field.description or ""
    return fields


if __name__ == "__main__":
    print(fields_page() if "--page" in sys.argv else json.dumps(Config.model_json_schema(), indent=2), end="")
