"""Held-out photographs, for validation: whole, with their low-resolution versions."""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.format.manifest import load_manifest
from pipeline.errors import UserError
from pipeline.storage import Storage


@dataclass(frozen=True)
class HeldOutPhoto:
    """A photograph that training never sees."""

    name: str
    hr: NDArray[np.uint8]
    """(H, W, 3); both sides are multiples of the scale."""
    lr: NDArray[np.uint8]
    """(H / scale, W / scale, 3)."""


def read_held_out(root: str) -> list[HeldOutPhoto]:
    """All held-out photographs of the data set, in its order; empty where it has none.

    Raises:
        UserError: no data set at `root`, or a file that is not what the manifest says.
    """
    manifest = load_manifest(root)
    storage = Storage(root)
    photos = []
    for shard in manifest.held_out:
        content = storage.read_bytes(shard.name)
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            raise UserError(
                f"{storage.path(shard.name)}: differs from its checksum in the manifest; prepare it again"
            )
        rows = pq.read_table(io.BytesIO(content)).to_pylist()
        if len(rows) != shard.rows:
            raise UserError(
                f"{storage.path(shard.name)}: has {len(rows)} rows, and the manifest {shard.rows}; prepare it again"
            )
        for row in rows:
            height, width, scale = row["height"], row["width"], manifest.scale
            hr = np.frombuffer(row["hr"], np.uint8).reshape(height, width, 3)
            lr = np.frombuffer(row["lr"], np.uint8).reshape(height // scale, width // scale, 3)
            photos.append(HeldOutPhoto(row["name"], hr, lr))
    return photos
