"""The record of an output folder, upscale.json: which model and settings made its images, and from which inputs.

It is written before the first image, so a killed run leaves it. Processes with the same settings may share a folder: if
one replaces the other's record, only addresses of inputs are lost.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow

from pipeline.errors import UserError
from pipeline.evaluation.image_files import SUFFIXES
from pipeline.storage import Storage

FILE = "upscale.json"
_REMEDY = "use --overwrite to replace, or another --output"


@dataclass(frozen=True)
class OutputRecord:
    """How an output folder was made."""

    model: str
    """As the user wrote it; not compared."""
    settings: Mapping[str, Any]
    """Everything that changes pixels by more than rounding; JSON values."""
    inputs: Mapping[str, str | None]
    """Relative name of an output to the full address of its input; None: made with other settings, or otherwise."""


def claim(output: Storage, record: OutputRecord, overwrite: bool = False) -> set[str]:
    """Records that the outputs in `record.inputs` are made with its settings; to be called before the first is written.

    With `overwrite`, existing outputs that were made otherwise are removed first: a run that is killed then never
    leaves outputs of two models that cannot be distinguished.

    Returns:
        Relative names of the outputs that exist, with these settings and from these inputs.

    Raises:
        UserError: the folder has outputs that were made otherwise, and `overwrite` is off; or it cannot be written.
    """
    try:
        existing = set(output.files())
        earlier = _read(output) if FILE in existing else None
        if earlier is not None and earlier.settings == record.settings:
            known = earlier.inputs
        else:
            if earlier is not None and not overwrite:
                _require_no_outputs(output, earlier, record, existing)
            known = dict.fromkeys(name for name in existing if name.endswith(tuple(SUFFIXES.values())))
        stale = [
            name
            for name, source in sorted(record.inputs.items())
            if name in existing and known.get(name, source) != source
        ]
        if stale and not overwrite:
            raise UserError(f"--output {output.uri}: {_difference(stale, known, record)}; {_REMEDY}")
        for name in stale:
            output.remove(name)
        merged = OutputRecord(record.model, record.settings, {**known, **record.inputs})
        if merged != earlier:
            text = json.dumps(asdict(merged), indent=1, sort_keys=True)
            output.write_bytes(FILE, f"{text}\n".encode())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"--output {output.uri}: {FILE} cannot be updated ({str(error).splitlines()[0]}); choose another folder"
        ) from None
    return existing & record.inputs.keys() - set(stale)


def _read(output: Storage) -> OutputRecord | None:
    """The folder's record; None for a corrupt one: its images then count as made by something else."""
    try:
        record = OutputRecord(**json.loads(output.read_bytes(FILE)))
    except (ValueError, TypeError):
        return None
    valid = isinstance(record.settings, dict) and isinstance(record.inputs, dict)
    return record if valid else None


def _require_no_outputs(
    output: Storage, earlier: OutputRecord, record: OutputRecord, existing: set[str]
) -> None:
    if not any(source is not None and name in existing for name, source in earlier.inputs.items()):
        return
    keys = sorted(earlier.settings.keys() | record.settings.keys())
    pairs = [(key, earlier.settings.get(key), record.settings.get(key)) for key in keys]
    changes = ", ".join(
        f"{key} {str(old)[:12]} is now {str(new)[:12]}" for key, old, new in pairs if old != new
    )
    raise UserError(
        f"--output {output.uri}: its images were made by {earlier.model} with other settings ({changes}); {_REMEDY}"
    )


def _difference(stale: list[str], known: Mapping[str, str | None], record: OutputRecord) -> str:
    name = stale[0]
    more = f" ({len(stale)} such files)" if len(stale) > 1 else ""
    if known[name] is None:
        return f"{name} exists, but {FILE} does not list it as made with these settings{more}"
    return f"{name} was made from {known[name]}, and is now the output of {record.inputs[name]}{more}"
