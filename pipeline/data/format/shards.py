"""Parquet shards: schemas, cells, and an atomic writer with one row per row group and deterministic bytes."""

import hashlib
import io
import os
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from pipeline.data.format.manifest import Shard
from pipeline.imaging.arrays import encoded
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
        pa.field("row_checksums", pa.binary(), nullable=False),
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


def encode_pixels(pixels: np.ndarray, codec: str) -> bytes:
    """uint8 (h, w, 3) as the bytes of a cell: row-major RGB (`raw`), or a lossless WebP file (`webp`)."""
    if codec != "webp":
        return pixels.tobytes()
    return encoded(pixels, "WEBP", lossless=True, quality=20, method=1, exact=True)


def decode_pixels(cell: bytes, codec: str, side: int) -> np.ndarray:
    """The inverse of `encode_pixels` for a square patch: uint8 (side, side, 3). Raises ValueError."""
    if codec != "webp":
        return np.frombuffer(cell, np.uint8).reshape(side, side, 3)
    try:
        with Image.open(io.BytesIO(cell), formats=("WEBP",)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"cannot be decoded: {error}") from None
    if pixels.shape != (side, side, 3):
        raise ValueError(f"a WebP of {pixels.shape}, expected {side} px")
    return pixels


class ShardWriter:
    """Writes one shard; `finish` publishes it atomically, `abandon` removes it."""

    def __init__(self, storage: Storage, name: str, schema: pa.Schema) -> None:
        self.storage, self.name, self.rows = storage, name, 0
        folder = Path(tempfile.gettempdir()) if storage.remote else Path(storage.uri)
        folder.mkdir(parents=True, exist_ok=True)
        self._partial = folder / f".{name}.{uuid.uuid4().hex[:8]}.partial"
        self._sink = pa.OSFile(str(self._partial), "wb")
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression="NONE",
            use_dictionary=False,  # one value per page: plain bytes at an offset that the footer gives
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        )

    @property
    def bytes(self) -> int:
        """Bytes written so far, without the footer."""
        return self._sink.tell()

    def write(self, rows: pa.Table) -> None:
        """Appends rows of the schema, each as its own row group."""
        self._writer.write_table(rows, row_group_size=1)
        self.rows += rows.num_rows

    def finish(self) -> Shard:
        """Completes the file, makes it durable, and renames it to `name`."""
        self._writer.close()
        self._sink.close()
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.seek(-8, os.SEEK_END) + 8  # the footer's length, then PAR1
            footer_bytes = int.from_bytes(file.read(4), "little") + 8
            file.seek(-footer_bytes, os.SEEK_END)
            footer_sha256 = hashlib.sha256(file.read()).hexdigest()
        filesystem, base = self.storage.filesystem()
        if self.storage.remote:
            fs.copy_files(
                str(self._partial),
                f"{base}/{self.name}",
                fs.LocalFileSystem(),
                destination_filesystem=filesystem,
            )
            self._partial.unlink()
        else:
            self._partial.replace(Path(base) / self.name)
            sync_folder(Path(base))
        return Shard(self.name, self.rows, size, sha256, footer_sha256, footer_bytes)

    def abandon(self) -> None:
        """Removes an unfinished file."""
        self._writer.close()
        self._sink.close()
        self._partial.unlink(missing_ok=True)
