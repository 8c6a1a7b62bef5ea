"""A data set of a few noise patches, written without ingest."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.data.format import manifest as manifests
from pipeline.data.format.row_checksums import pack, patch_checksums
from pipeline.data.format.shards import PATCH_SCHEMA, ShardWriter, encode_pixels
from pipeline.storage import Storage


def pixels(patch: int, side: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """A patch whose low-resolution version is every scale-th pixel of it, so that a wrong crop is detected."""
    hr = np.random.default_rng(patch).integers(0, 256, (side, side, 3), np.uint8)
    return hr, np.ascontiguousarray(hr[::scale, ::scale])


def write_patches(
    folder: Path, count: int, side: int = 32, scale: int = 4, rows: int = 8, codec: str = "raw"
) -> str:
    """Writes `count` patches in shards of `rows`; returns the data set's root."""
    storage = Storage(str(folder))
    shards = []
    for first in range(0, count, rows):
        writer = ShardWriter(storage, f"patches-{len(shards):05d}.parquet", PATCH_SCHEMA)
        for patch in range(first, min(first + rows, count)):
            hr, lr = pixels(patch, side, scale)
            cells = {
                "patch_id": patch,
                "source_id": 0,
                "y": 0,
                "x": 0,
                "hr": encode_pixels(hr, codec),
                "lr": encode_pixels(lr, codec),
                "detail": 1.0,
                "row_checksums": pack(patch, patch_checksums(hr, lr)),
            }
            writer.write(pa.Table.from_pylist([cells], schema=PATCH_SCHEMA))
        shards.append(asdict(writer.finish()))
    content = {
        "patches": count,
        "settings": {"scale": scale, "patch_px": side, "codec": codec},
        "shards": shards,
        "held_out": [],
        "sources": [],
        "rejected": [],
        "degradation": {},
    }
    storage.write_bytes(manifests.NAME, manifests.encode(content))
    return storage.uri
