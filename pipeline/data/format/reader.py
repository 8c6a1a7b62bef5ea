"""Reads patches from shards by patch id: one range read each; every byte that is used is verified.

Offsets come from the footer, which must have the manifest's sha256. Raw patches are read as the rows that a crop needs
and verified by row checksums (raw_rows.py). WebP patches are read whole and verified by row checksums once decoded.
"""

import hashlib
import logging
import time
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.format.manifest import Manifest, Shard
from pipeline.data.format.raw_rows import column_edges, read_cells, read_rows
from pipeline.data.format.row_checksums import patch_checksums, unpack
from pipeline.data.format.shards import PATCH_SCHEMA, decode_pixels
from pipeline.storage import Storage, join

_OPEN_SHARDS = 256
# A failed read from an object store is retried after these seconds, in addition to its client's own retries.
RETRY_AFTER_S = (1.0, 3.0, 9.0)

logger = logging.getLogger(__name__)


class CorruptPatch(Exception):
    """A patch whose bytes are not those that were written."""

    def __init__(self, shard: str, row: int, reason: str) -> None:
        super().__init__(f"{shard}, row {row}: {reason}")
        self.shard, self.row, self.reason = shard, row, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return CorruptPatch, (self.shard, self.row, self.reason)


class StoreUnreachable(OSError):
    """An object store is unreachable; whether the patch is corrupt is unknown."""


class PatchReader:
    """Patches of one data set. Keeps few files open, and 36 bytes per row of every shard read so far.

    If the data set is in an object store, threads may share the reader.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._storage = Storage(manifest.root)
        self.remote = self._storage.remote
        self._filesystem, self._base = self._storage.filesystem()
        # A file closes with its last reference: another thread may be reading when it leaves the cache.
        self._file = lru_cache(maxsize=_OPEN_SHARDS)(self._open)
        self.edges = cache(self._read_edges)
        # Only `row` needs it, whose callers read one shard after another; it takes 2.4 MB for 364 rows.
        self._footer = lru_cache(maxsize=1)(self._read_footer)

    def crop(self, patch: int, y: int, x: int, crop_px: int) -> tuple[np.ndarray, np.ndarray]:
        """High- and low-resolution crop of a patch: uint8 (crop, crop, 3) and (crop / scale, crop / scale, 3), views.

        y, x: pixels of the patch, multiples of the scale.

        Raises:
            CorruptPatch: what was read is not what was written.
            StoreUnreachable: the object store is unreachable.
        """
        scale = self.manifest.scale
        hr, lr = self._rows(patch, y, y + crop_px)
        return hr[:, x : x + crop_px], lr[:, x // scale : (x + crop_px) // scale]

    def patch(self, patch: int) -> tuple[np.ndarray, np.ndarray]:
        """A whole patch: uint8 (patch_px, patch_px, 3) and its low-resolution version. Raises as `crop`."""
        return self._rows(patch, 0, self.manifest.patch_px)

    def row(self, number: int, row: int) -> dict[str, Any]:
        """All cells of a row of shard `number`, verified by page checksums. Raises as `crop`."""
        try:
            first, *_, end = self.edges(number)[row].tolist()
            # The row at its offset in the file. The zeros before it are never touched, so they take no memory.
            content = np.zeros(end, np.uint8)
            content[first:] = self._read(number, first, end - first)
            file = pq.ParquetFile(
                pa.BufferReader(content), metadata=self._footer(number), page_checksum_verification=True
            )
            try:
                (cells,) = file.read_row_group(row).to_pylist()
            except (OSError, ValueError, pa.ArrowException):
                raise ValueError(_unreadable_column(file, row)) from None
            expected = int(self.manifest.first_ids[number]) + row
            if cells["patch_id"] != expected:
                raise ValueError(f"contains patch {cells['patch_id']}, expected {expected}")
            return cells
        except ValueError as error:
            raise self._corrupt(number, row, error) from None

    def close(self) -> None:
        """Closes all files."""
        self._file.cache_clear()

    def _rows(self, patch: int, top: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
        number, row = self.manifest.locate(patch)
        scale, side = self.manifest.scale, self.manifest.patch_px
        try:
            edges = self.edges(number)[row].tolist()
            read = partial(self._read, number)
            if self.manifest.codec == "raw":
                return read_rows(read, edges, self.manifest, patch, top, bottom, one_request=self.remote)
            *cells, sums = read_cells(read, edges, self.manifest)
            hr, lr = (
                decode_pixels(cell, self.manifest.codec, length)
                for cell, length in zip(cells, (side, side // scale), strict=True)
            )
            sums = unpack(patch, sums)
            if not np.array_equal(patch_checksums(hr, lr), sums):
                raise ValueError("row checksum mismatch")
            return hr[top:bottom], lr[top // scale : bottom // scale]
        except ValueError as error:
            raise self._corrupt(number, row, error) from None

    def _corrupt(self, number: int, row: int, error: ValueError) -> CorruptPatch:
        return CorruptPatch(self._storage.path(self.manifest.shards[number].name), row, str(error))

    def _read(self, number: int, offset: int, size: int) -> np.ndarray:
        """A range of a shard, uint8. Raises ValueError: it cannot be read; StoreUnreachable."""
        waits = iter(RETRY_AFTER_S)
        while True:
            try:
                data = self._file(number).read_at(size, offset)
            except (OSError, pa.ArrowException) as error:
                reason = str(error).splitlines()[0]
                # A missing file stays so, and a disk that fails now will fail again.
                if not self.remote or isinstance(error, FileNotFoundError):
                    raise ValueError(f"cannot be read: {reason}") from None
            else:
                if len(data) < size:
                    raise ValueError(f"cannot be read: ends at byte {offset + len(data)}")
                return np.frombuffer(data, np.uint8)
            wait_s = next(waits, None)
            path = self._storage.path(self.manifest.shards[number].name)
            if wait_s is None:
                raise StoreUnreachable(f"{path}: the object store is unreachable ({reason})")
            logger.warning("%s: retrying in %g s (%s)", path, wait_s, reason)
            self._file.cache_clear()  # the next attempt opens it again
            time.sleep(wait_s)

    def _open(self, number: int) -> pa.NativeFile:
        return self._filesystem.open_input_file(join(self._base, self.manifest.shards[number].name))

    def _read_footer(self, number: int) -> pq.FileMetaData:
        shard = self.manifest.shards[number]
        footer = self._read(number, shard.bytes - shard.footer_bytes, shard.footer_bytes)
        try:
            return read_footer(footer.tobytes(), shard)
        except pa.ArrowException as error:
            raise ValueError(str(error).splitlines()[0]) from None

    def _read_edges(self, number: int) -> np.ndarray:
        return column_edges(self._read_footer(number), self.manifest.shards[number].bytes)


def _unreadable_column(file: pq.ParquetFile, row: int) -> str:
    for name in PATCH_SCHEMA.names:
        try:
            file.read_row_group(row, columns=[name])
        except (OSError, ValueError, pa.ArrowException) as error:
            return f"column {name}: {str(error).splitlines()[0]}"
    return "cannot be read"


def read_footer(footer: bytes, shard: Shard) -> pq.FileMetaData:
    """A shard's Parquet metadata, from its last `footer_bytes`.

    Raises:
        ValueError: checksum mismatch with the manifest, or not one row group for each of its rows.
        pyarrow.ArrowException: not a Parquet footer.
    """
    if hashlib.sha256(footer).hexdigest() != shard.footer_sha256:
        raise ValueError("footer: checksum mismatch with the manifest")
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    if not metadata.num_rows == metadata.num_row_groups == shard.rows:
        raise ValueError(
            f"has {metadata.num_rows} rows in {metadata.num_row_groups} row groups, and the manifest {shard.rows} rows"
        )
    return metadata
