"""Checkpoints: written whole off the training thread, verified before use, kept by rule.

A checkpoint is a folder `checkpoints/<stage>-<step>/` in the run's folder:

    generator.safetensors   averaged weights, with the architecture in the metadata: a model file by itself
    training.safetensors    networks, optimisers, counters on the device
    state.json              stage, step, best, digests
    manifest.json           size and sha256 of the three, written last

A folder whose manifest is missing or does not agree is never used.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pyarrow
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.storage import Storage

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"^(psnr|gan)-(\d{8})$")
_FILES = ("generator.safetensors", "training.safetensors", "state.json")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class CheckpointName:
    """A checkpoint's place in the run; later ones are greater."""

    step: int
    stage: str

    def __str__(self) -> str:
        return f"{self.stage}-{self.step:08d}"

    @property
    def folder(self) -> str:
        """Its folder below the run's."""
        return f"{FOLDER}/{self}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's contents, on the CPU."""

    name: CheckpointName
    ema: dict[str, Tensor]
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


class DamagedCheckpoint(Exception):
    """A checkpoint that does not agree with its own manifest; the message says where."""


def write(run: Storage, checkpoint: Checkpoint, metadata: dict[str, str]) -> None:
    """Writes a checkpoint; it counts from the moment when its manifest is there.

    Args:
        run: the run's folder.
        checkpoint: what to write.
        metadata: architecture of the generator, kept in its file.

    Raises:
        FloatingPointError: a tensor is not finite; such a checkpoint is never written.
        OSError: the storage refuses, a full disk for instance.
    """
    for name, value in [*checkpoint.ema.items(), *checkpoint.tensors.items()]:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise FloatingPointError(f"{checkpoint.name}: {name} holds a non-finite value; not written")
    folder = run / checkpoint.name.folder
    run.remove(checkpoint.name.folder)
    contents = {
        "generator.safetensors": safetensors.torch.save(_compact(checkpoint.ema), metadata),
        "training.safetensors": safetensors.torch.save(_compact(checkpoint.tensors)),
        "state.json": json.dumps({"format": FORMAT, **checkpoint.scalars}, indent=2).encode(),
    }
    files = {}
    for name, content in contents.items():
        folder.write_bytes(name, content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    folder.write_bytes("manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=2).encode())


def read(run: Storage, name: CheckpointName) -> Checkpoint:
    """Reads a checkpoint after checking every byte against its manifest. Raises DamagedCheckpoint."""
    folder = run / name.folder
    try:
        files = json.loads(folder.read_bytes("manifest.json"))["files"]
        contents = {}
        for file in _FILES:
            content = folder.read_bytes(file)
            if hashlib.sha256(content).hexdigest() != files[file]["sha256"]:
                raise DamagedCheckpoint(f"{folder.path(file)}: differs from its checksum")
            contents[file] = content
        return Checkpoint(
            name,
            safetensors.torch.load(contents["generator.safetensors"]),
            safetensors.torch.load(contents["training.safetensors"]),
            json.loads(contents["state.json"]),
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        pyarrow.ArrowException,
        safetensors.SafetensorError,
    ) as error:
        raise DamagedCheckpoint(f"{folder.uri}: {type(error).__name__}: {error}") from error


def listed(run: Storage) -> list[CheckpointName]:
    """All checkpoints that have a manifest, the oldest first; whether they are sound is for `read` to say."""
    found = []
    for name in run.names(FOLDER):
        match = _NAME.match(name)
        if match and run.exists(f"{FOLDER}/{name}/manifest.json"):
            found.append(CheckpointName(int(match[2]), match[1]))
    return sorted(found)


def newest(run: Storage) -> Checkpoint | None:
    """The newest sound checkpoint; None where there never was one.

    A damaged one is named in the log and passed over.

    Raises:
        UserError: there are checkpoints, and all are damaged or have lost their manifests: starting from zero would
            hide it. (A process that is killed while it writes its first leaves one without a manifest.)
    """
    names = listed(run)
    for name in reversed(names):
        try:
            return read(run, name)
        except DamagedCheckpoint as error:
            logger.warning("checkpoint passed over: %s", error)
    if names:
        raise UserError(
            f"{run.path(FOLDER)}: all {len(names)} checkpoints are damaged; restore one, "
            "or remove the run's folder to start again"
        )
    if len(folders := run.names(FOLDER)) > 1:
        raise UserError(
            f"{run.path(FOLDER)}: none of {len(folders)} checkpoints has its manifest.json; restore one, "
            "or remove the run's folder to start again"
        )
    return None


def any_there(run: Storage) -> bool:
    """Whether `newest` would not begin from zero."""
    return bool(listed(run)) or len(run.names(FOLDER)) > 1


class Checkpointer:
    """Writes checkpoints on a thread of its own, one after the other, and removes old ones.

    Use as a context manager: leaving it waits for the last write.
    """

    def __init__(self, run: Storage, keep: int, metadata: dict[str, str], first_step: int = 0) -> None:
        """
        Args:
            run: the run's folder.
            keep: newest checkpoints to keep; the best ones and the last of stage 1 are kept besides.
            metadata: architecture of the generator, kept in its file.
            first_step: where training goes on. Later checkpoints that are there were passed over as damaged; they stay
                until they are written anew, and do not count as kept.
        """
        self._run, self._keep, self._metadata = run, keep, metadata
        self._passed_over = {name for name in listed(run) if name.step > first_step}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Checkpointer":
        self._remove_partial()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def save(
        self,
        name: CheckpointName,
        ema: dict[str, Tensor],
        tensors: dict[str, Tensor],
        scalars: dict[str, Any],
        before: Callable[[], None],
        keep: frozenset[int],
    ) -> None:
        """Copies the live tensors and hands them to the thread.

        Args:
            name: the checkpoint's stage and step.
            ema: averaged weights.
            tensors: everything else.
            scalars: JSON values.
            before: called on the thread before the checkpoint appears, for what must be durable by then.
            keep: steps whose checkpoints are kept whatever their age.

        Raises:
            OSError: an earlier write failed.
        """
        self.wait()
        checkpoint = Checkpoint(name, _copied(ema), _copied(tensors), scalars)

        def work() -> None:
            before()
            try:
                write(self._run, checkpoint, self._metadata)
            except BaseException:
                self._run.remove(name.folder)  # on a full disk its parts would be in the way of the next try
                raise
            self._passed_over.discard(name)
            self._remove_old(keep | {name.step})

        self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Waits for the write under way, and raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _remove_partial(self) -> None:
        sound = {str(name) for name in listed(self._run)}
        for name in self._run.names(FOLDER):
            if name not in sound:
                logger.warning("removing the unfinished checkpoint %s", name)
                self._run.remove(f"{FOLDER}/{name}")

    def _remove_old(self, keep: frozenset[int]) -> None:
        sound = [name for name in listed(self._run) if name not in self._passed_over]
        for name in sound[: -self._keep]:
            if name.step not in keep:
                # The manifest goes first: a folder half removed must not look like a damaged checkpoint.
                self._run.remove(f"{name.folder}/manifest.json")
                self._run.remove(name.folder)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _compact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors stores row-major tensors only; channels-last weights are brought into that order.
    return {name: value.contiguous() for name, value in tensors.items()}
