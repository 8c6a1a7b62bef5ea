"""Reads the held-out set: whole images for validation, with their low-resolution versions."""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.format.manifest import Manifest
from pipeline.errors import UserError
from pipeline.storage import Storage


@dataclass(frozen=True)
class HeldOutPhoto:
    """An image that is not used in training."""

    name: str
    hr: NDArray[np.uint8]
    """(H, W, 3); both sides are multiples of the scale."""
    lr: NDArray[np.uint8]
    """(H / scale, W / scale, 3)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the HR image."""
        return self.hr.shape[0], self.hr.shape[1]


def read_held_out(manifest: Manifest) -> list[HeldOutPhoto]:
    """All held-out images of the data set, in its order; empty if it has none.

    Raises:
        UserError: a file does not match the manifest.
    """
    storage = Storage(manifest.root)
    photos = []
    for shard in manifest.held_out:
        content = storage.read_bytes(shard.name)
        valid = hashlib.sha256(content).hexdigest() == shard.sha256
        rows = pq.read_table(io.BytesIO(content)).to_pylist() if valid else []
        if len(rows) != shard.rows:
            raise UserError(
                f"{storage.path(shard.name)}: differs from the manifest; prepare the data set again"
            )
        for row in rows:
            height, width, scale = row["height"], row["width"], manifest.scale
            hr = np.frombuffer(row["hr"], np.uint8).reshape(height, width, 3)
            lr = np.frombuffer(row["lr"], np.uint8).reshape(height // scale, width // scale, 3)
            photos.append(HeldOutPhoto(row["name"], hr, lr))
    return photos
