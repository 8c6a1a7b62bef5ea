"""--help of the commands with a configuration file: the fields that are needed first; --help-all lists every field."""

import argparse
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from pipeline.errors import without_secrets

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
SHORT, ALL = ("-h", "--help"), "--help-all"


def print_short_help(parser: argparse.ArgumentParser, config: BaseModel, fields: Sequence[str]) -> None:
    """Prints the command's own flags, `fields` with the values that apply without flags, and the sections' names.

    Args:
        parser: has the command's own flags.
        config: the configuration from file and environment.
        fields: dotted names.
    """
    group = parser.add_argument_group("fields that most runs set")
    for name in fields:
        section, value = config, None
        for part in name.split("."):
            info = type(section).model_fields[part]
            value = section = getattr(section, part)
        first_sentence = (info.description or "").partition(". ")[0].removesuffix(".")
        shown = "" if value is None else f" (now: {without_secrets(str(value))})"
        group.add_argument(f"--{name}", metavar="X", help=f"{first_sentence}{shown}.".replace("%", "%%"))
    advice = f"{ALL} lists them, docs/fields.md describes them; each is also a field of the file."
    parser.epilog = f"{_sections(config)}. {advice}"
    parser.print_help()


def _sections(config: BaseModel) -> str:
    nested = {name: getattr(config, name) for name in type(config).model_fields}
    counts = {name: _count(value) for name, value in nested.items() if isinstance(value, BaseModel)}
    plain = len(nested) - len(counts)
    return f"All fields: {plain} without a section, " + ", ".join(
        f"{name}.* ({n})" for name, n in counts.items()
    )


def _count(section: Any) -> int:
    values = [getattr(section, name) for name in type(section).model_fields]
    return sum(_count(value) if isinstance(value, BaseModel) else 1 for value in values)
