"""Reads the weights of a model source: a weight file, a checkpoint's or run's folder, or a model in models/."""

from pathlib import Path

import pyarrow

from pipeline.errors import UserError
from pipeline.storage import Storage, is_remote
from pipeline.training import checkpoint

GENERATOR_FILE, TRAINING_FILE = "generator.safetensors", "training.safetensors"
SUFFIXES = (".safetensors", ".pth.tar", ".pth", ".pt", ".ckpt")
_SHIPPED = Path(__file__).resolve().parents[2] / "models"


def shipped_model(source: str) -> Path | None:
    """The file of a model in the project's folder models/, by its name, such as compact-x4; None: another source."""
    path = _SHIPPED / f"{source}.safetensors"
    return path if path.parent == _SHIPPED and path.is_file() else None


def find_model_file(source: str, file: str, name: str) -> tuple[bytes, str]:
    """The bytes of a weight file, local or in an object store, and the address of the file or checkpoint.

    Args:
        source: a weight file, a checkpoint's folder, a run's folder (its newest valid checkpoint), or the name of a
            model in models/.
        file: which of a checkpoint's files.
        name: what errors call the source.

    Raises:
        UserError: missing, unreadable or, in a checkpoint, corrupt.
    """
    if file == GENERATOR_FILE and (shipped := shipped_model(source)):
        return shipped.read_bytes(), str(shipped)
    if source.lower().endswith(SUFFIXES):
        folder, _, base = source.rpartition("/")
        storage = Storage(folder or ("/" if source.startswith("/") else "."))
        try:
            return storage.read_bytes(base), storage.path(base)
        except (OSError, pyarrow.ArrowException):
            raise UserError(f"{name}: no such file, or it cannot be read") from None
    if not is_remote(source) and "://" not in source and Path(source).expanduser().is_file():
        hint = " (an .onnx file's source is one)" if source.lower().endswith(".onnx") else ""
        raise UserError(f"{name}: weights are {', '.join(SUFFIXES)} files{hint}")
    storage = Storage(source)
    if storage.exists(file):
        try:
            return checkpoint.read_files(storage, [file])[file], storage.uri
        except checkpoint.CorruptCheckpoint as error:
            path = storage.path(file)
            raise UserError(f"{error}; use another checkpoint, or give the path {path}") from None
    corrupt = ""
    for listed in reversed(checkpoint.listed(storage)):
        try:
            return checkpoint.read_files(storage / listed.folder, [file])[file], storage.path(listed.folder)
        except checkpoint.CorruptCheckpoint as error:
            corrupt = corrupt or f"; {error}"
    if storage.exists():
        raise UserError(f"{name}: neither a checkpoint ({file}) nor a run with one (checkpoints/){corrupt}")
    others = "models:/NAME@ALIAS, compact-x4, " if file == GENERATOR_FILE else ""
    raise UserError(
        f"{name}: no such file or folder; give {others}a checkpoint's or run's folder, or a weight file "
        "(.safetensors, .pth, .pt, .ckpt)"
    )
