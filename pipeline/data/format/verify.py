"""Reads a whole data set again and names everything that is not what was written."""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow
from tqdm import tqdm

from pipeline.data.format.manifest import Manifest, Shard
from pipeline.data.format.reader import DamagedPatch, PatchReader, StoreAway, read_footer
from pipeline.errors import UserError
from pipeline.storage import Storage, join

_CHUNK_BYTES = 8 << 20
# Hashing lets go of the interpreter's lock; more threads than this only help a slow disk.
_THREADS = 4
_MISSING = "missing"


def verify(manifest: Manifest, progress: bool = True) -> list[str]:
    """One line for each damaged thing, empty when every byte is as it was written.

    A shard whose sha256 is the manifest's is right in every byte; its number of rows must be the manifest's too. In any
    other, every patch is read and checked, and the damaged ones are named with the photograph that they come from.

    Raises:
        UserError: an object store does not answer, so nothing can be said of what lies there.
    """
    storage = Storage(manifest.root)
    shards = [*manifest.shards, *manifest.held_out]
    found: list[str] = []
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        tqdm(
            total=sum(shard.bytes for shard in shards), unit="B", unit_scale=True, disable=not progress,
            file=sys.stdout, mininterval=1 if sys.stdout.isatty() else 10, desc="verifying",
        ) as bar,
    ):  # fmt: skip
        verdicts = threads.map(lambda shard: _shard_damage(storage, shard), shards)
        for number, (shard, damage) in enumerate(zip(shards, verdicts, strict=True)):
            bar.update(shard.bytes)
            if damage is None:
                continue
            has_patches = number < len(manifest.shards) and damage != _MISSING
            rows = _damaged_rows(manifest, number) if has_patches else []
            found += rows or [f"{storage.path(shard.name)}: {damage}"]
    return found


def _shard_damage(storage: Storage, shard: Shard) -> str | None:
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
        return "its sha256 is not the one in the manifest"
    try:
        read_footer(tail, shard)
    except (ValueError, pyarrow.ArrowException) as error:
        return str(error).splitlines()[0]
    return None


def _damaged_rows(manifest: Manifest, number: int) -> list[str]:
    """A line for every damaged patch of a shard, one for all where all are; none where the damage lies between them."""
    reader = PatchReader(manifest.root, manifest.layout)
    first = int(manifest.layout.first_ids[number])
    damaged: list[DamagedPatch] = []
    for row in range(manifest.shards[number].rows):
        try:
            reader.row(number, row)
            reader.patch(first + row)
        except DamagedPatch as damage:
            damaged.append(damage)
        except StoreAway as error:
            raise UserError(f"data.root={manifest.root}: {error}; verify again when it does") from None
    reader.close()
    if len(damaged) == manifest.shards[number].rows > 1 and len({damage.reason for damage in damaged}) == 1:
        return [f"{damaged[0].shard}, all {len(damaged)} rows: {damaged[0].reason}"]
    return [
        f"{damage} (patch {first + damage.row}, of {_photograph(manifest, first + damage.row)!r})"
        for damage in damaged
    ]


def _photograph(manifest: Manifest, patch: int) -> str:
    for entry in manifest.sources:
        if entry["set"] == "train" and 0 <= patch - entry["first_patch"] < entry["patches"]:
            return entry["path"]
    return "an unknown photograph"
