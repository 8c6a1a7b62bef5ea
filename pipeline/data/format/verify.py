"""Verifies a data set: reads every byte again and lists what is corrupt."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pyarrow

from pipeline.data.format.manifest import Manifest, Shard
from pipeline.data.format.reader import CorruptPatch, PatchReader, StoreUnreachable, read_footer
from pipeline.errors import UserError
from pipeline.progress import progress_bar
from pipeline.storage import Storage, join

_CHUNK_BYTES = 8 << 20
# Hashing releases the interpreter lock; more threads only help a slow disk.
_THREADS = 4
_MISSING = "missing"


def verify(manifest: Manifest) -> list[str]:
    """One line for each corrupt file or patch; empty if every byte is as it was written.

    A shard whose sha256 is the manifest's is correct in every byte; its number of rows must be the manifest's too. In
    any other shard, every patch is read and verified, and the corrupt ones are listed with the image they come from.

    Raises:
        UserError: the object store is unreachable, so its content cannot be verified.
    """
    storage = Storage(manifest.root)
    shards = [*manifest.shards, *manifest.held_out]
    corrupt: list[str] = []
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        progress_bar(
            total=sum(shard.bytes for shard in shards), unit="B", unit_scale=True, desc="verifying"
        ) as bar,
    ):
        reasons = threads.map(lambda shard: _shard_corruption(storage, shard), shards)
        for number, (shard, reason) in enumerate(zip(shards, reasons, strict=True)):
            bar.update(shard.bytes)
            if reason is None:
                continue
            has_patches = number < len(manifest.shards) and reason != _MISSING
            rows = _corrupt_rows(manifest, number) if has_patches else []
            corrupt += rows or [f"{storage.path(shard.name)}: {reason}"]
    return corrupt


def _shard_corruption(storage: Storage, shard: Shard) -> str | None:
    try:
        filesystem, base = storage.filesystem()
        digest, size, tail = hashlib.sha256(), 0, b""
        with filesystem.open_input_stream(join(base, shard.name)) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                tail = (tail + chunk)[-shard.footer_bytes :]
    except FileNotFoundError:
        return _MISSING
    except (OSError, pyarrow.ArrowException) as error:
        return f"cannot be read: {str(error).splitlines()[0]}"
    if size != shard.bytes:
        return f"has {size} bytes, not {shard.bytes}"
    if digest.hexdigest() != shard.sha256:
        return "sha256 mismatch with the manifest"
    try:
        read_footer(tail, shard)
    except (ValueError, pyarrow.ArrowException) as error:
        return str(error).splitlines()[0]
    return None


def _corrupt_rows(manifest: Manifest, number: int) -> list[str]:
    """One line per corrupt patch; one for all if all share a reason; none if only bytes between rows differ."""
    reader = PatchReader(manifest)
    first = int(manifest.first_ids[number])
    corrupt: list[CorruptPatch] = []
    for row in range(manifest.shards[number].rows):
        try:
            reader.row(number, row)
            reader.patch(first + row)
        except CorruptPatch as error:
            corrupt.append(error)
        except StoreUnreachable as error:
            raise UserError(
                f"data.root={manifest.root}: {error}; verify again once it is reachable"
            ) from None
    reader.close()
    if len(corrupt) == manifest.shards[number].rows > 1 and len({error.reason for error in corrupt}) == 1:
        return [f"{corrupt[0].shard}, all {len(corrupt)} rows: {corrupt[0].reason}"]
    return [
        f"{error} (patch {first + error.row}, of {_source(manifest, first + error.row)!r})"
        for error in corrupt
    ]


def _source(manifest: Manifest, patch: int) -> str:
    for entry in manifest.sources:
        if entry["set"] == "train" and 0 <= patch - entry["first_patch"] < entry["patches"]:
            return entry["path"]
    return "an unknown image"
