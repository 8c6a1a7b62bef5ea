"""What is done to one photograph: check, degrade, cut. Runs anywhere; results go through Ray Data as Arrow tables."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.format.row_checksums import row_checks
from pipeline.data.format.shards import encode_pixels
from pipeline.data.ingest.decoding import PhotoRefused, read_photo, refuse_large_file
from pipeline.data.ingest.geometry import cut, grid, patch_bytes
from pipeline.data.ingest.pairs import match_degradation
from pipeline.data.ingest.sources import PhotoFile

# A photograph gives one row with `info` (JSON), then its patches; a held-out one gives a single row of pixels.
STREAM_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("info", pa.string()),
        ("y", pa.int32()),
        ("x", pa.int32()),
        ("detail", pa.float32()),
        ("hr", pa.binary()),
        ("lr", pa.binary()),
        ("checks", pa.binary()),
    ]
)
_TABLE_BYTES = 16 << 20


@dataclass(frozen=True)
class PhotoJob:
    """One photograph to ingest."""

    index: int  # place in the order of ingest
    photo: PhotoFile
    held_out: bool
    low: PhotoFile | None = None  # its low-resolution file, where the user brings those


def cut_photos(jobs: Iterable[PhotoJob], config: DataConfig, paired: bool) -> Iterator[pa.Table]:
    """Tables of STREAM_SCHEMA for several photographs, in order; each holds rows of one photograph."""
    for job in jobs:
        yield from cut_photo(job, config, paired)


def cut_photo(job: PhotoJob, config: DataConfig, paired: bool) -> Iterator[pa.Table]:
    """Tables of one photograph: first the row with its info, then its patches in row-major order."""
    info: dict[str, Any] = {}
    try:
        hr, lr, info = _load(job, config, paired)
    except PhotoRefused as refusal:
        yield _table([_row(job.index, info={"refused": str(refusal)})])
        return
    yield _table([_row(job.index, info=info)])
    if job.held_out:
        yield _table([_row(job.index, hr.shape[0], hr.shape[1], 0.0, hr.tobytes(), lr.tobytes(), b"")])
        return
    scale, side = config.scale, config.patch_px
    places = grid(hr.shape[0], hr.shape[1], side, config.patch_stride_px)
    scores = detail_scores(hr, places, side)
    kept = [number for number, score in enumerate(scores) if score >= config.min_detail]
    most = max(1, _TABLE_BYTES // patch_bytes(side, scale))
    for first in range(0, len(kept), most):
        part = kept[first : first + most]
        hr_patches = np.stack([_window(hr, *places[number], side) for number in part])
        lr_patches = np.stack(
            [
                _window(lr, places[number][0] // scale, places[number][1] // scale, side // scale)
                for number in part
            ]
        )
        checks = np.hstack(
            [row_checks(_rows(patches)).reshape(len(part), -1) for patches in (hr_patches, lr_patches)]
        )
        columns = {
            "index": pa.array([job.index] * len(part), pa.int32()),
            "info": pa.nulls(len(part), pa.string()),
            "y": pa.array([places[number][0] for number in part], pa.int32()),
            "x": pa.array([places[number][1] for number in part], pa.int32()),
            "detail": pa.array(scores[part]),
            "hr": _cells(hr_patches, config.codec),
            "lr": _cells(lr_patches, config.codec),
            "checks": _binaries(checks.astype("<u8")),
        }
        yield pa.table(columns, schema=STREAM_SCHEMA)


def detail_scores(image: np.ndarray, places: list[tuple[int, int]], side: int) -> np.ndarray:
    """Mean absolute difference between neighbours in green of the patches at `places`, in levels: float32.

    0 for a flat patch, about 10 for foliage.
    """
    green = np.ascontiguousarray(image[:, :, 1])
    across, down = _distance(green[:, 1:], green[:, :-1]), _distance(green[1:], green[:-1])
    sums = [
        int(across[y : y + side, x : x + side - 1].sum(dtype=np.int64))
        + int(down[y : y + side - 1, x : x + side].sum(dtype=np.int64))
        for y, x in places
    ]
    return (np.array(sums, np.float64) / (2 * side * (side - 1))).astype(np.float32)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.maximum(one, other) - np.minimum(one, other)


def _window(image: np.ndarray, y: int, x: int, side: int) -> np.ndarray:
    return image[y : y + side, x : x + side]


def _rows(patches: np.ndarray) -> np.ndarray:
    """All rows of pixels of several patches, one below the other."""
    return patches.reshape(patches.shape[0] * patches.shape[1], -1)


def _cells(patches: np.ndarray, codec: str) -> pa.Array:
    if codec == "webp":
        return pa.array([encode_pixels(patch, codec) for patch in patches], pa.binary())
    return _binaries(patches)


def _binaries(values: np.ndarray) -> pa.Array:
    """Each item of the first axis as one cell of bytes, without a copy."""
    size = values[0].nbytes
    ends = np.arange(len(values) + 1, dtype=np.int32) * np.int32(size)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def _load(job: PhotoJob, config: DataConfig, paired: bool) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    # Imported here, so that listing and reading data sets does not need the imaging room's libraries.
    from pipeline.imaging import matlab_bicubic_downscale

    # Known from the listing: a huge file costs no memory.
    refuse_large_file(job.photo.size, config.max_megapixels)
    data = job.photo.read()
    photo = read_photo(data, config.max_megapixels)
    height, width = photo.pixels.shape[:2]
    info: dict[str, Any] = {
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
        raise PhotoRefused(f"too small: {width} x {height} pixels, a patch needs {least}")
    hr = np.ascontiguousarray(hr)
    if not paired:
        return hr, matlab_bicubic_downscale(hr, config.scale, edge=config.edge), info
    if job.low is None:
        raise PhotoRefused("no low-resolution file of its name in data.lr_dir")
    try:
        refuse_large_file(job.low.size, config.max_megapixels)
        lr = read_photo(job.low.read(), config.max_megapixels).pixels
    except PhotoRefused as refusal:
        raise PhotoRefused(f"its low-resolution file {job.low.name}: {refusal}") from None
    expected = (hr.shape[0] // config.scale, hr.shape[1] // config.scale)
    if lr.shape[:2] != expected:
        raise PhotoRefused(
            f"its low-resolution file {job.low.name} has {lr.shape[1]} x {lr.shape[0]} pixels, "
            f"not {expected[1]} x {expected[0]}"
        )
    info["degradation"] = match_degradation(hr, lr, config.scale)
    return hr, np.ascontiguousarray(lr), info


def pixels_sha256(pixels: np.ndarray) -> str:
    """sha256 over "height width" and the RGB bytes, so that equal pictures in different files are recognised."""
    digest = hashlib.sha256(f"{pixels.shape[0]} {pixels.shape[1]} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _row(
    index: int,
    y: int = 0,
    x: int = 0,
    detail: float = 0.0,
    hr: bytes = b"",
    lr: bytes = b"",
    checks: bytes = b"",
    info: dict[str, Any] | None = None,
) -> dict[str, Any]:
    text = None if info is None else json.dumps(info, sort_keys=True)
    return {
        "index": index,
        "info": text,
        "y": y,
        "x": x,
        "detail": detail,
        "hr": hr,
        "lr": lr,
        "checks": checks,
    }


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=STREAM_SCHEMA)
