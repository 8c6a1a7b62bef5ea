"""Reads, degrades and cuts one image into patches; runs in any process. Lengths are in high-resolution pixels."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.format.row_checksums import patch_checksums
from pipeline.data.format.shards import encode_pixels
from pipeline.data.ingest.decoding import PhotoRejected, read_photo, reject_large_file
from pipeline.data.ingest.sources import PhotoFile
from pipeline.errors import UserError
from pipeline.imaging import float_bicubic_downscale, matlab_bicubic_downscale
from pipeline.imaging.alignment import pair_fault

# Patches of one image; `row_checksums` without the seal, which needs the patch id.
CUT_SCHEMA = pa.schema(
    [
        ("y", pa.int32()),
        ("x", pa.int32()),
        ("hr", pa.binary()),
        ("lr", pa.binary()),
        ("detail", pa.float32()),
        ("row_checksums", pa.binary()),
    ]
)
_TABLE_BYTES = 16 << 20
_CORNER_PX = 384  # low-resolution pixels per side that are compared
_EQUAL_SHARE = 0.97  # share of equal values above which a degradation is recognized


@dataclass(frozen=True)
class ImageJob:
    """One image to ingest."""

    index: int  # position in the order of ingest
    photo: PhotoFile
    held_out: bool
    low: PhotoFile | None = None  # its low-resolution file, if the user provides those


@dataclass(frozen=True)
class CutImage:
    """A usable image."""

    facts: dict[str, Any]
    """Its entry in the manifest: bytes, sha256, pixels_sha256, height, width, ..."""
    tables: Iterator[pa.Table]
    """Its patches in row-major order, as tables of CUT_SCHEMA of at most 16 MiB, computed when they are read. The one
    row of a held-out image is the whole image, cut to a multiple of the scale."""


@dataclass(frozen=True)
class Rejection:
    """An image that cannot be used."""

    reason: str


def cut_image(job: ImageJob, config: DataConfig, paired: bool) -> CutImage | Rejection:
    """Reads, checks and degrades an image; its patches are cut as the result is consumed."""
    try:
        hr, lr, facts = _load(job, config, paired)
    except PhotoRejected as rejection:
        return Rejection(str(rejection))
    return CutImage(facts, _whole(hr, lr) if job.held_out else _patches(hr, lr, config))


def _whole(hr: np.ndarray, lr: np.ndarray) -> Iterator[pa.Table]:
    row = {"y": 0, "x": 0, "hr": hr.tobytes(), "lr": lr.tobytes(), "detail": 0.0, "row_checksums": b""}
    yield pa.Table.from_pylist([row], schema=CUT_SCHEMA)


def _patches(hr: np.ndarray, lr: np.ndarray, config: DataConfig) -> Iterator[pa.Table]:
    scale, side = config.scale, config.patch_px
    origins = grid(hr.shape[0], hr.shape[1], side, config.patch_stride_px)
    scores = detail_scores(hr, origins, side)
    kept = [number for number, score in enumerate(scores) if score >= config.min_detail]
    most = max(1, _TABLE_BYTES // patch_bytes(side, scale))
    for first in range(0, len(kept), most):
        part = kept[first : first + most]
        corners = np.array([origins[number] for number in part], np.int32)
        hr_patches = np.stack([hr[y : y + side, x : x + side] for y, x in corners])
        lr_patches = np.stack([lr[y : y + side // scale, x : x + side // scale] for y, x in corners // scale])
        columns = [
            pa.array(corners[:, 0]),
            pa.array(corners[:, 1]),
            _cells(hr_patches, config.codec),
            _cells(lr_patches, config.codec),
            pa.array(scores[part]),
            _binaries(patch_checksums(hr_patches, lr_patches).astype("<u8")),
        ]
        yield pa.Table.from_arrays(columns, schema=CUT_SCHEMA)


def detail_scores(image: np.ndarray, origins: list[tuple[int, int]], side: int) -> np.ndarray:
    """Mean absolute difference between adjacent green values of the patches at `origins`, in levels: float32 (n,).

    0 for a flat patch, about 10 for foliage.
    """
    green = np.ascontiguousarray(image[:, :, 1])
    across, down = _distance(green[:, 1:], green[:, :-1]), _distance(green[1:], green[:-1])
    sums = [
        int(across[y : y + side, x : x + side - 1].sum(dtype=np.int64))
        + int(down[y : y + side - 1, x : x + side].sum(dtype=np.int64))
        for y, x in origins
    ]
    return (np.array(sums, np.float64) / (2 * side * (side - 1))).astype(np.float32)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.maximum(one, other) - np.minimum(one, other)


def _cells(patches: np.ndarray, codec: str) -> pa.Array:
    if codec == "webp":
        return pa.array([encode_pixels(patch, codec) for patch in patches], pa.binary())
    return _binaries(patches)


def _binaries(values: np.ndarray) -> pa.Array:
    """Each item of the first axis as one binary cell, without a copy."""
    size = values[0].nbytes
    ends = np.arange(len(values) + 1, dtype=np.int32) * np.int32(size)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def _load(job: ImageJob, config: DataConfig, paired: bool) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """HR and LR image, cut to a multiple of the scale, and the manifest's facts. Raises PhotoRejected."""
    # From the listing's size: a huge file is never read into memory.
    reject_large_file(job.photo.size, config.max_megapixels)
    data = job.photo.read()
    photo = read_photo(data, config.max_megapixels)
    height, width = photo.pixels.shape[:2]
    facts: dict[str, Any] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "format": photo.format,
        "lossy": photo.lossy,
        "notes": list(photo.notes),
        "height": height,
        "width": width,
        "pixels_sha256": pixels_sha256(photo.pixels),
    }
    hr = photo.pixels[: cut(height, config.scale), : cut(width, config.scale)]
    least = config.scale if job.held_out else config.patch_px
    if min(hr.shape[:2]) < least:
        raise PhotoRejected(f"too small: {width} x {height} pixels, a patch needs {least}")
    hr = np.ascontiguousarray(hr)
    if not paired:
        return hr, matlab_bicubic_downscale(hr, config.scale, edge=config.edge), facts
    if job.low is None:
        raise PhotoRejected("no low-resolution file of its name in data.lr_dir")
    try:
        reject_large_file(job.low.size, config.max_megapixels)
        lr = read_photo(job.low.read(), config.max_megapixels).pixels
    except PhotoRejected as rejection:
        raise PhotoRejected(f"its low-resolution file {job.low.name}: {rejection}") from None
    expected = (hr.shape[0] // config.scale, hr.shape[1] // config.scale)
    if lr.shape[:2] != expected:
        raise PhotoRejected(
            f"its low-resolution file {job.low.name} has {lr.shape[1]} x {lr.shape[0]} pixels, "
            f"not {expected[1]} x {expected[0]}"
        )
    facts["degradation"] = match_degradation(hr, lr, config.scale)
    if facts["degradation"] == "other" and (fault := pair_fault(hr, lr, config.scale)):
        raise PhotoRejected(f"{fault} ({job.low.name})")
    return hr, np.ascontiguousarray(lr), facts


def pixels_sha256(pixels: np.ndarray) -> str:
    """sha256 over "height width" and the RGB bytes, so that equal images in different files are found."""
    digest = hashlib.sha256(f"{pixels.shape[0]} {pixels.shape[1]} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def match_degradation(hr: np.ndarray, lr: np.ndarray, scale: int) -> str:
    """The degradation that made `lr` from `hr`: `matlab_uint8`, `matlab_float` (as BasicSR's `imresize`) or `other`.

    Compares the upper left corner, with either edge; more than 97 % of its values must be equal.
    """
    rows, columns = min(_CORNER_PX, lr.shape[0]), min(_CORNER_PX, lr.shape[1])
    margin = 4  # low-resolution pixels beyond the corner, so that the cut changes nothing inside it
    corner = np.ascontiguousarray(hr[: (rows + margin) * scale, : (columns + margin) * scale])

    def share(downscale: Callable[..., np.ndarray]) -> float:
        """Share of equal values, with the edge that fits better."""
        edges = (downscale(corner, scale, edge=edge) for edge in ("replicate", "symmetric"))
        return max(float((low[:rows, :columns] == lr[:rows, :columns]).mean()) for low in edges)

    shares = {"matlab_uint8": share(matlab_bicubic_downscale), "matlab_float": share(float_bicubic_downscale)}
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] > _EQUAL_SHARE else "other"


def check_geometry(config: DataConfig) -> None:
    """Checks that patches fit the scale and have no gaps between them. Raises UserError."""
    for field in ("patch_px", "patch_stride_px"):
        value = getattr(config, field)
        if value % config.scale:
            raise UserError(
                f"data.{field}={value} is not a multiple of data.scale={config.scale}; use {cut(value, config.scale)}"
            )
    if config.patch_stride_px > config.patch_px:
        raise UserError(
            f"data.patch_stride_px={config.patch_stride_px} is larger than data.patch_px={config.patch_px}: "
            "pixels between patches would be lost"
        )


def cut(length: int, scale: int) -> int:
    """The largest multiple of `scale` not above `length`."""
    return length - length % scale


def origins(length: int, patch_px: int, stride_px: int) -> list[int]:
    """Offsets of patches along a side of `length`: every `stride_px`, and one flush with the far end.

    `length` must be a multiple of the scale and at least `patch_px`; then every offset is a multiple of the scale.
    """
    last = length - patch_px
    offsets = list(range(0, last + 1, stride_px))
    if offsets[-1] != last:
        offsets.append(last)
    return offsets


def grid(height: int, width: int, patch_px: int, stride_px: int) -> list[tuple[int, int]]:
    """(y, x) of the upper left corner of every patch, row by row."""
    return [(y, x) for y in origins(height, patch_px, stride_px) for x in origins(width, patch_px, stride_px)]


def expected_bytes(height: int, width: int, config: DataConfig) -> int:
    """Raw bytes of the patches of one image, low resolution included; 0 if it is too small."""
    height, width = cut(height, config.scale), cut(width, config.scale)
    if min(height, width) < config.patch_px:
        return 0
    patches = grid(height, width, config.patch_px, config.patch_stride_px)
    return len(patches) * patch_bytes(config.patch_px, config.scale)


def patch_bytes(patch_px: int, scale: int) -> int:
    """Raw bytes of one HR/LR pair."""
    return 3 * (patch_px**2 + (patch_px // scale) ** 2)
