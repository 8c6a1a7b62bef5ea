"""Reads patches out of shards by patch id: one range read each, every byte that is used verified.

Offsets come from the footer, which must have the manifest's sha256. Raw patches are read as the rows that a crop needs,
against the row checks (pipeline/data/checks.py); other codecs as a whole row group, against Parquet's page checksums.
"""

import hashlib
import logging
import os
import threading
import time
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.format.manifest import Layout, Shard
from pipeline.data.format.row_checksums import row_checks, unpack_checks
from pipeline.data.format.shards import decode_pixels
from pipeline.storage import Storage, join

_COLUMNS = ("patch_id", "source_id", "y", "x", "hr", "lr", "detail", "checks")
_HR, _LR, _CHECKS = _COLUMNS.index("hr"), _COLUMNS.index("lr"), _COLUMNS.index("checks")
_OPEN_SHARDS = 256
_LENGTH = 4  # a plain binary value is preceded by its length
# A read from an object store that fails is tried again after these seconds, besides what its client does itself.
RETRY_AFTER_S = (1.0, 3.0, 9.0)

logger = logging.getLogger(__name__)


class DamagedPatch(Exception):
    """A patch whose bytes are not those that were written."""

    def __init__(self, shard: str, row: int, reason: str) -> None:
        super().__init__(f"{shard}, row {row}: {reason}")
        self.shard, self.row, self.reason = shard, row, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedPatch, (self.shard, self.row, self.reason)


class StoreAway(OSError):
    """An object store that does not answer; nothing is known of the patch."""


class _LocalFile:
    """Positional reads from a file; several threads may share it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> np.ndarray:
        buffer = np.empty(size, np.uint8)
        done = 0
        while done < size:
            count = os.preadv(self.descriptor, [buffer[done:].data], offset + done)
            if count == 0:
                raise EOFError(f"ends at byte {offset + done}")
            done += count
        return buffer

    def close(self) -> None:
        os.close(self.descriptor)


class _RemoteFile:
    """Range reads from an object store; several threads may share it."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self.file = filesystem.open_input_file(path)

    def read(self, offset: int, size: int) -> np.ndarray:
        data = self.file.read_at(size, offset)
        if len(data) != size:
            raise EOFError(f"ends at byte {offset + len(data)}")
        return np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """Does nothing: another thread may be reading, and the file closes when the last one has let go of it."""


class PatchReader:
    """Patches of one data set. Keeps few files open, and 36 bytes for every row of a shard that it has met.

    Where the data set is in an object store, threads may share it.
    """

    def __init__(self, root: str, layout: Layout) -> None:
        self.layout = layout
        self._storage = Storage(root)
        self._filesystem, self._base = self._storage.filesystem()
        self._files: OrderedDict[int, _LocalFile | _RemoteFile] = OrderedDict()
        self._edges: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def remote(self) -> bool:
        """Whether every read asks an object store."""
        return self._storage.remote

    def crop(self, patch: int, y: int, x: int, crop_px: int) -> tuple[np.ndarray, np.ndarray]:
        """High- and low-resolution crop of a patch: uint8 (crop, crop, 3) and (crop / scale, crop / scale, 3), views.

        y, x: pixels of the patch, multiples of the scale.

        Raises:
            DamagedPatch: what was read is not what was written.
            StoreAway: an object store does not answer.
        """
        scale, side = self.layout.scale, self.layout.patch_px
        if self.layout.codec == "raw":
            hr, lr = self._raw_rows(patch, y, y + crop_px)
        else:
            hr, lr = self.patch(patch)
            hr, lr = hr[y : y + crop_px], lr[y // scale : (y + crop_px) // scale]
        assert hr.shape[1] == side
        return hr[:, x : x + crop_px], lr[:, x // scale : (x + crop_px) // scale]

    def patch(self, patch: int) -> tuple[np.ndarray, np.ndarray]:
        """A whole patch: uint8 (patch_px, patch_px, 3) and its low-resolution version. Raises as `crop`."""
        number, row = self.layout.locate(patch)
        cells = self.row(number, row)
        scale, side, codec = self.layout.scale, self.layout.patch_px, self.layout.codec
        try:
            hr, lr = (
                decode_pixels(cells["hr"], codec, side),
                decode_pixels(cells["lr"], codec, side // scale),
            )
        except (ValueError, OSError) as error:
            raise self._damaged(number, row, f"does not decode: {error}") from None
        checks = unpack_checks(patch, np.frombuffer(cells["checks"], np.uint8))
        if checks is None or not np.array_equal(
            checks, np.concatenate([row_checks(hr.reshape(len(hr), -1)), row_checks(lr.reshape(len(lr), -1))])
        ):
            raise self._damaged(number, row, "pixels fail their checks")
        return hr, lr

    def row(self, number: int, row: int) -> dict[str, Any]:
        """All cells of a row of shard `number`, page checksums verified. Raises as `crop`."""
        edges = self._edges_of(number, row)[row].tolist()
        data = self._read(number, row, edges[0], edges[-1] - edges[0])
        codec = self.layout.codec if self.layout.codec in ("lz4", "zstd") else None
        cells: dict[str, Any] = {}
        for column, name in enumerate(_COLUMNS):
            chunk = data[edges[column] - edges[0] : edges[column + 1] - edges[0]]
            try:
                value = read_page(chunk.data, codec if name in ("hr", "lr") else None)
            except (ValueError, IndexError, OSError, pa.ArrowException) as error:
                raise self._damaged(number, row, f"column {name}: {error}") from None
            if name in ("hr", "lr", "checks"):
                if int.from_bytes(value[:_LENGTH], "little") != len(value) - _LENGTH:
                    raise self._damaged(number, row, f"column {name}: wrong length")
                cells[name] = value[_LENGTH:]
            elif name == "detail":
                cells[name] = float(np.frombuffer(value, "<f4")[0])
            else:
                cells[name] = int.from_bytes(value, "little", signed=True)
        expected = int(self.layout.first_ids[number]) + row
        if cells["patch_id"] != expected:
            raise self._damaged(number, row, f"holds patch {cells['patch_id']}, not {expected}")
        return cells

    def close(self) -> None:
        """Closes all files."""
        while self._files:
            self._files.popitem()[1].close()

    def _raw_rows(self, patch: int, top: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows top..bottom of a raw patch and the low-resolution rows below them, checked."""
        number, row = self.layout.locate(patch)
        edges = self._edges_of(number, row)[row].tolist()
        scale, side = self.layout.scale, self.layout.patch_px
        small, width, small_width = side // scale, 3 * side, 3 * (side // scale)
        hr_data = edges[_HR + 1] - side * width
        lr_data = edges[_LR + 1] - small * small_width
        checks_bytes = 8 * (side + small + 1)
        end = edges[_CHECKS + 1]
        low, high = top // scale, bottom // scale
        if self.remote:  # one request costs more than the bytes that it brings
            everything = self._read(number, row, hr_data + top * width, end - hr_data - top * width)
            hr = everything[: (bottom - top) * width]
            tail = everything[lr_data + low * small_width - hr_data - top * width :]
        else:
            hr = self._read(number, row, hr_data + top * width, (bottom - top) * width)
            first = lr_data + low * small_width
            tail = self._read(number, row, first, end - first)
        hr = hr.reshape(bottom - top, width)
        lr = tail[: (high - low) * small_width].reshape(high - low, small_width)
        checks = unpack_checks(patch, tail[-checks_bytes:])
        if checks is None:
            raise self._damaged(number, row, "column checks is damaged")
        if not np.array_equal(row_checks(hr), checks[top:bottom]):
            raise self._damaged(number, row, "column hr fails its checks")
        if not np.array_equal(row_checks(lr), checks[side + low : side + high]):
            raise self._damaged(number, row, "column lr fails its checks")
        return hr.reshape(-1, side, 3), lr.reshape(-1, small, 3)

    def _damaged(self, number: int, row: int, reason: str) -> DamagedPatch:
        return DamagedPatch(self._storage.path(self.layout.shards[number].name), row, reason)

    def _read(self, number: int, row: int, offset: int, size: int) -> np.ndarray:
        waits = iter(RETRY_AFTER_S)
        while True:
            try:
                return self._file(number).read(offset, size)
            except (OSError, EOFError, pa.ArrowException) as error:
                reason = str(error).splitlines()[0]
                # What is gone or cut stays so, and a disk that cannot read it now will not later.
                if not self.remote or isinstance(error, FileNotFoundError | EOFError):
                    raise self._damaged(number, row, f"cannot be read: {reason}") from None
            wait_s = next(waits, None)
            where = self._storage.path(self.layout.shards[number].name)
            if wait_s is None:
                raise StoreAway(f"{where}: the object store does not answer ({reason})")
            logger.warning("%s: trying again in %g s (%s)", where, wait_s, reason)
            with self._lock:
                self._files.pop(number, None)  # opened anew for the next try
            time.sleep(wait_s)

    def _file(self, number: int) -> _LocalFile | _RemoteFile:
        with self._lock:
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
                return file
        # Opening may wait for a server. Two threads may open the same file; either will do.
        shard = self.layout.shards[number]
        if self.remote:
            file = _RemoteFile(self._filesystem, join(self._base, shard.name))
        else:
            file = _LocalFile(self._storage.path(shard.name))
        with self._lock:
            self._files[number] = file
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        return file

    def _edges_of(self, number: int, row: int) -> np.ndarray:
        found = self._edges.get(number)
        if found is None:
            shard = self.layout.shards[number]
            footer = self._read(number, row, shard.bytes - shard.footer_bytes, shard.footer_bytes).tobytes()
            try:
                found = _parse_footer(footer, shard)
            except (ValueError, pa.ArrowException) as error:
                raise self._damaged(number, row, str(error)) from None
            self._edges[number] = found
        return found


def read_footer(footer: bytes, shard: Shard) -> pq.FileMetaData:
    """A shard's Parquet metadata, from its last `footer_bytes`.

    Raises:
        ValueError: not the bytes that the manifest has, or not one row group for each of its rows.
        pyarrow.ArrowException: not a Parquet footer.
    """
    if hashlib.sha256(footer).hexdigest() != shard.footer_sha256:
        raise ValueError("the footer is not the one in the manifest")
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    if not metadata.num_rows == metadata.num_row_groups == shard.rows:
        raise ValueError(
            f"has {metadata.num_rows} rows in {metadata.num_row_groups} row groups, and the manifest {shard.rows} rows"
        )
    return metadata


def _parse_footer(footer: bytes, shard: Shard) -> np.ndarray:
    """Where the columns of every row begin in the file, and the last one ends: (rows, columns + 1)."""
    metadata = read_footer(footer, shard)
    # A data set of a million rows is read at random, so all of its edges stay in memory.
    kind = np.uint32 if shard.bytes < 2**32 else np.int64
    edges = np.empty((metadata.num_row_groups, len(_COLUMNS) + 1), kind)
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        end = group.column(0).data_page_offset
        for column in range(len(_COLUMNS)):
            chunk = group.column(column)
            if chunk.data_page_offset != end:
                raise ValueError("the columns of a row do not follow one another")
            edges[index, column] = end
            end += chunk.total_compressed_size
        edges[index, -1] = end
    return edges


def read_page(chunk: memoryview, codec: str | None) -> memoryview:
    """The values of a column chunk of one plain, required data page, its CRC verified. Raises ValueError."""
    header, length = _thrift_struct(chunk, 0)
    body = chunk[length:]
    data_header = header.get(5)
    if (
        header.get(1) != 0
        or not isinstance(data_header, dict)
        or data_header.get(1) != 1
        or data_header.get(2) != 0
    ):
        raise ValueError("not a plain page of one value")
    if header.get(3) != len(body) or 4 not in header:
        raise ValueError("the page's header is damaged")
    if zlib.crc32(body) != header[4] & 0xFFFFFFFF:
        raise ValueError("the page fails its checksum")
    if codec is None:
        return body
    size = header[2]
    name = {"lz4": "lz4_raw", "zstd": "zstd"}[codec]
    return memoryview(pa.decompress(body, decompressed_size=size, codec=name, asbytes=True))


def _thrift_struct(data: memoryview, position: int) -> tuple[dict[int, Any], int]:
    """Integers, booleans and nested structs of a struct in Thrift's compact protocol, by field id; and its end."""
    fields: dict[int, Any] = {}
    field = 0
    while True:
        head = data[position]
        position += 1
        if head == 0:
            return fields, position
        kind, delta = head & 15, head >> 4
        if delta:
            field += delta
        else:
            raw, position = _varint(data, position)
            field = (raw >> 1) ^ -(raw & 1)
        if kind in (1, 2):
            fields[field] = kind == 1
        elif kind in (3, 4, 5, 6):
            raw, position = _varint(data, position)
            fields[field] = (raw >> 1) ^ -(raw & 1)
        elif kind == 12:
            fields[field], position = _thrift_struct(data, position)
        else:
            raise ValueError("the page's header is damaged")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("the page's header is damaged")
