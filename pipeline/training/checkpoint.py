"""The checkpoint format: written atomically, verified before use.

A checkpoint is a folder `checkpoints/<stage>-<step>/` in the run's folder:

    generator.safetensors   EMA weights, with the architecture in the metadata: a model file by itself
    training.safetensors    networks, optimizers, counters on the device
    state.json              stage, step, best validations, latest metrics
    manifest.json           size and sha256 of the three, written last

A folder without a manifest, or with a file that does not match it, is never used.
"""

import hashlib
import logging
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.model.encoding import encode_tensors
from pipeline.run_folder import CHECKPOINT_MANIFEST, CHECKPOINT_STATE, CheckpointManifest, FileDigest
from pipeline.storage import Storage

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"^(psnr|gan)-(\d{8})$")
_FILES = ("generator.safetensors", "training.safetensors", "state.json")

logger = logging.getLogger(__name__)


Stage = Literal["psnr", "gan"]


@dataclass(frozen=True, order=True)
class CheckpointName:
    """Stage and step of a checkpoint; ordered by step."""

    step: int
    stage: Stage

    @staticmethod
    def parse(text: str) -> "CheckpointName | None":
        """The inverse of `str`; None if the text is not the name of a checkpoint."""
        match = _NAME.match(text)
        return CheckpointName(int(match[2]), "gan" if match[1] == "gan" else "psnr") if match else None

    def __str__(self) -> str:
        return f"{self.stage}-{self.step:08d}"

    @property
    def folder(self) -> str:
        """Path below the run's folder."""
        return f"{FOLDER}/{self}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's contents, on the CPU."""

    name: CheckpointName
    ema: dict[str, Tensor]
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


class CorruptCheckpoint(Exception):
    """A checkpoint that cannot be read or does not match its manifest; the message names the file."""


def write(run: Storage, checkpoint: Checkpoint, metadata: dict[str, str]) -> None:
    """Writes a checkpoint; it is valid once its manifest is written. `metadata` is kept in the generator's file.

    Raises:
        FloatingPointError: a tensor is not finite; nothing is written.
        OSError: the storage cannot be written (a full disk, for instance).
    """
    for tensors in (checkpoint.ema, checkpoint.tensors):
        floating = {
            name: value for name, value in tensors.items() if value.is_floating_point() and value.numel()
        }
        largest = torch._foreach_norm([*floating.values()], float("inf")) if floating else []
        for tensor, value in zip(floating, largest, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"{checkpoint.name}: {tensor} holds a non-finite value; not written")
    folder, name = run / checkpoint.name.folder, str(checkpoint.name)
    run.remove(checkpoint.name.folder)
    contents: dict[str, bytes | memoryview] = {
        "generator.safetensors": encode_tensors(checkpoint.ema, metadata),
        "training.safetensors": encode_tensors(checkpoint.tensors),
        "state.json": CHECKPOINT_STATE.dump({"format": FORMAT, **checkpoint.scalars}),
    }
    files = {}
    for file, content in contents.items():
        folder.write_bytes(file, content)
        files[file] = FileDigest(len(content), hashlib.sha256(content).hexdigest())
    CHECKPOINT_MANIFEST.at(name=name).write(run, CheckpointManifest(FORMAT, files))


def read(run: Storage, name: CheckpointName) -> Checkpoint:
    """Reads a checkpoint and verifies every file against its manifest. Raises CorruptCheckpoint."""
    folder = run / name.folder
    contents = read_files(folder, _FILES)
    try:
        return Checkpoint(
            name,
            safetensors.torch.load(contents["generator.safetensors"]),
            safetensors.torch.load(contents["training.safetensors"]),
            CHECKPOINT_STATE.parse(contents["state.json"]),
        )
    except (ValueError, safetensors.SafetensorError) as error:
        raise CorruptCheckpoint(f"{folder.uri}: {type(error).__name__}: {error}") from error


def read_files(folder: Storage, files: Sequence[str]) -> dict[str, bytes]:
    """Files of the checkpoint in `folder`, verified against its manifest. Raises CorruptCheckpoint."""
    try:
        digests = CHECKPOINT_MANIFEST.parse(folder.read_bytes("manifest.json")).files
        contents = {file: folder.read_bytes(file) for file in files}
        corrupt = [
            file for file in files if hashlib.sha256(contents[file]).hexdigest() != digests[file].sha256
        ]
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise CorruptCheckpoint(f"{folder.uri}: {type(error).__name__}: {error}") from error
    if corrupt:
        raise CorruptCheckpoint(f"{folder.path(corrupt[0])}: checksum mismatch")
    return contents


def copy(source: Storage, target: Storage, name: CheckpointName) -> None:
    """Copies a checkpoint from one run to another; it is valid there once its manifest is written.

    Raises:
        CorruptCheckpoint: it does not match its manifest; nothing is copied.
        OSError: the target cannot be written.
    """
    read(source, name)
    for file in (*_FILES, "manifest.json"):
        (target / name.folder).write_bytes(file, (source / name.folder).read_bytes(file))


def listed(run: Storage) -> list[CheckpointName]:
    """All checkpoints that have a manifest, the oldest first; integrity is verified by `read`."""
    names = map(CheckpointName.parse, run.names(FOLDER))
    return sorted(name for name in names if name and run.exists(f"{name.folder}/manifest.json"))


def chosen_by(run: Storage) -> str | None:
    """The metric of the best validation in the newest checkpoint of stage 2, such as Set14/lpips; not verified."""
    with suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        names = [name for name in listed(run) if name.stage == "gan"]
        state = CHECKPOINT_STATE.parse(run.read_bytes(f"{names[-1].folder}/state.json"))
        return str(state["best"][0]["metric"])
    return None


def newest(run: Storage) -> Checkpoint | None:
    """The newest valid checkpoint; None if there never was one. Corrupt checkpoints are logged and skipped.

    Raises:
        UserError: there are checkpoints, but all are corrupt or have no manifest: starting from zero would hide it. (A
            process that is killed while writing its first checkpoint leaves one without a manifest.)
    """
    names = listed(run)
    for name in reversed(names):
        try:
            return read(run, name)
        except CorruptCheckpoint as error:
            logger.warning("skipping corrupt checkpoint: %s", error)
    folders = run.names(FOLDER)
    if names or len(folders) > 1:
        corrupt = f"all {len(names)} checkpoints are corrupt"
        incomplete = f"none of {len(folders)} checkpoints has its manifest.json"
        raise UserError(
            f"{run.path(FOLDER)}: {corrupt if names else incomplete}; restore one, or remove the run's folder to start "
            "again"
        )
    return None


def newest_if_valid(run: Storage) -> Checkpoint | None:
    """The newest checkpoint; None if it is corrupt or there is none."""
    names = listed(run)
    with suppress(CorruptCheckpoint):
        return read(run, names[-1]) if names else None
    return None


def can_resume(run: Storage) -> bool:
    """Whether there is a checkpoint to resume from (even if it is corrupt)."""
    return bool(listed(run)) or len(run.names(FOLDER)) > 1
