"""Writes Parquet shards: one row per row group, page checksums, deterministic bytes, visible whole or not at all."""

import hashlib
import io
import os
import struct
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.format.manifest import Shard
from pipeline.storage import Storage, sync_folder

PATCH_SCHEMA = pa.schema(
    [
        pa.field("patch_id", pa.int64(), nullable=False),
        pa.field("source_id", pa.int32(), nullable=False),
        pa.field("y", pa.int32(), nullable=False),
        pa.field("x", pa.int32(), nullable=False),
        pa.field("hr", pa.binary(), nullable=False),
        pa.field("lr", pa.binary(), nullable=False),
        pa.field("detail", pa.float32(), nullable=False),
        pa.field("checks", pa.binary(), nullable=False),
    ]
)
HELD_OUT_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("hr", pa.binary(), nullable=False),
        pa.field("lr", pa.binary(), nullable=False),
    ]
)
COMPRESSION = {"raw": "NONE", "webp": "NONE", "lz4": "LZ4", "zstd": "ZSTD"}
_TAIL = struct.Struct("<I4s")


def encode_pixels(pixels: np.ndarray, codec: str) -> bytes:
    """uint8 (h, w, 3) as the bytes of a cell: row-major RGB, or a lossless WebP file."""
    if codec != "webp":
        return pixels.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(
        buffer, "WEBP", lossless=True, quality=20, method=1, exact=True
    )
    return buffer.getvalue()


def decode_pixels(cell: bytes | memoryview, codec: str, side: int) -> np.ndarray:
    """The inverse of `encode_pixels` for a square patch: uint8 (side, side, 3). Raises ValueError."""
    if codec != "webp":
        return np.frombuffer(cell, np.uint8).reshape(side, side, 3)
    with Image.open(io.BytesIO(cell), formats=("WEBP",)) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape != (side, side, 3):
        raise ValueError(f"a WebP of {pixels.shape}, not {side} px")
    return pixels


def split_footer(tail: bytes) -> int:
    """Length in bytes of a Parquet footer, its length field and magic included, from the file's last 8 bytes."""
    length, magic = _TAIL.unpack(tail[-_TAIL.size :])
    if magic != b"PAR1":
        raise ValueError("does not end as a Parquet file")
    return int(length) + _TAIL.size


class _HashingFile(io.RawIOBase):
    """Counts and hashes what passes through to a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        self.file.write(view)
        self.bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.bytes


class ShardWriter:
    """Writes one shard; `finish` publishes it, `abandon` leaves nothing behind."""

    def __init__(self, storage: Storage, name: str, schema: pa.Schema, codec: str) -> None:
        self.storage, self.name, self.rows = storage, name, 0
        folder = Path(tempfile.gettempdir()) if storage.remote else Path(storage.uri)
        folder.mkdir(parents=True, exist_ok=True)
        self._partial = folder / f".{name}.{uuid.uuid4().hex[:8]}.partial"
        self._file = self._partial.open("w+b")
        self._sink = _HashingFile(self._file)
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression={
                column: COMPRESSION[codec] if column in ("hr", "lr") else "NONE" for column in schema.names
            },
            use_dictionary=False,  # one value per page: plain bytes at an offset that the footer gives
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        )

    @property
    def bytes(self) -> int:
        """Bytes written so far, without the footer."""
        return self._sink.bytes

    def write(self, row: pa.Table) -> None:
        """Appends one row as a row group of its own."""
        self._writer.write_table(row, row_group_size=1)
        self.rows += row.num_rows

    def finish(self) -> Shard:
        """Completes the file, makes it durable, and gives it its name."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._sink.bytes
        self._file.seek(size - _TAIL.size)
        footer_bytes = split_footer(self._file.read())
        self._file.seek(size - footer_bytes)
        footer_sha256 = hashlib.sha256(self._file.read()).hexdigest()
        if self.storage.remote:
            self._upload()
        else:
            self._file.close()
            self._partial.replace(Path(self.storage.uri) / self.name)
            sync_folder(Path(self.storage.uri))
        return Shard(self.name, self.rows, size, self._sink.sha256.hexdigest(), footer_sha256, footer_bytes)

    def abandon(self) -> None:
        """Removes an unfinished file."""
        self._writer.close()
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _upload(self) -> None:
        filesystem, base = self.storage.filesystem()
        self._file.seek(0)
        with filesystem.open_output_stream(f"{base}/{self.name}") as remote:
            for chunk in _chunks(self._file):
                remote.write(chunk)
        self.abandon()


def _chunks(file: BinaryIO, size: int = 8 << 20) -> Iterator[bytes]:
    while chunk := file.read(size):
        yield chunk
