"""One worker's part of one training step: read, verified, cropped, flipped and put together."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.data.feed.samples import Samples
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.reader import DamagedPatch, PatchReader
from pipeline.errors import UserError

# A damaged patch is replaced by another draw; this many in a row are damaged only where nearly all are.
ATTEMPTS = 16
# An object store answers in tens of milliseconds: so many requests and steps at once hide that at 20 steps/s.
REQUESTS = 24
STEPS_AT_ONCE = 3
# Replacements come from seeds that are far from those which people choose.
_ATTEMPT_STRIDE = 2**40

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step; images stay uint8 until they are on the device."""

    lr: Tensor
    """(B, 3, h, w), uint8, channels-last in memory."""
    hr: Tensor
    """(B, 3, h * scale, w * scale), uint8, channels-last in memory."""
    damaged: int
    """Damaged patches that were drawn and replaced."""


def fetch_steps(
    reader: PatchReader, samples: Samples, steps: Sequence[int], first: int, last: int
) -> Generator[Batch, None, None]:
    """What `fetch` gives for each of `steps`, in their order; from an object store, several are under way at once.

    Raises:
        UserError, StoreAway: as `fetch`.
    """
    if not reader.remote:
        for step in steps:
            yield fetch(reader, samples, step, first, last)
        return
    requests, makers = ThreadPoolExecutor(REQUESTS), ThreadPoolExecutor(STEPS_AT_ONCE)
    under_way: deque[Future[Batch]] = deque()
    try:
        for step in steps:
            under_way.append(makers.submit(fetch, reader, samples, step, first, last, requests.map))
            if len(under_way) == STEPS_AT_ONCE:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        makers.shutdown(cancel_futures=True)
        requests.shutdown()


def fetch(
    reader: PatchReader,
    samples: Samples,
    step: int,
    first: int,
    last: int,
    for_each: Callable[[Callable[[int], int], Iterable[int]], Iterable[int]] = map,
) -> Batch:
    """Samples at positions first..last of the global batch of `step`.

    A damaged patch is logged once, counted, and replaced by a draw that (seed, step, position, attempt) decide, so
    whichever rank meets it replaces it alike.

    Args:
        for_each: `map`, or that of an executor whose threads share the samples.

    Raises:
        UserError: ATTEMPTS draws in a row were damaged.
        StoreAway: an object store does not answer.
    """
    count, side, scale = last - first, samples.crop_px, samples.scale
    hr = np.empty((count, side, side, 3), np.uint8)
    lr = np.empty((count, side // scale, side // scale, 3), np.uint8)
    draws = samples.of_step(step, first, last)
    places = list(
        zip(draws.patch.tolist(), draws.y.tolist(), draws.x.tolist(), draws.flips.tolist(), strict=True)
    )

    def put(index: int) -> int:
        """Fills one sample in; how many damaged patches were drawn for it."""
        (patch, y, x, flips), damaged = places[index], 0
        while True:
            try:
                crops = reader.crop(patch, y, x, side)
                break
            except DamagedPatch as error:
                damaged += 1
                _name_once(error.shard, error.row, error.reason)
                if damaged == ATTEMPTS:
                    raise UserError(
                        f"{error}; {damaged} patches in a row are damaged: check with prepare_data.py --verify, "
                        "and prepare the data set again"
                    ) from None
            patch, y, x, flips = _another(samples, step, first + index, damaged)
        for out, crop in zip((hr[index], lr[index]), crops, strict=True):
            put_flipped(out, crop, flips)
        return damaged

    damaged = sum(for_each(put, range(count)))
    return Batch(as_tensor(lr), as_tensor(hr), damaged)


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, h, w, 3) as (B, 3, h, w) over the same memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def flipped(pixels: np.ndarray, flips: int) -> np.ndarray:
    """A view of (h, w, 3): bit 0 flips left and right, bit 1 up and down, bit 2 transposes afterwards."""
    if flips & 1:
        pixels = pixels[:, ::-1]
    if flips & 2:
        pixels = pixels[::-1]
    if flips & 4:
        pixels = pixels.transpose(1, 0, 2)
    return pixels


def put_flipped(out: np.ndarray, pixels: np.ndarray, flips: int) -> None:
    """out = flipped(pixels, flips), a plane at a time where rows do not stay rows: three times as fast in numpy."""
    view = flipped(pixels, flips)
    if flips & 5:
        for channel in range(view.shape[2]):
            out[..., channel] = view[..., channel]
    else:
        out[...] = view


@contextmanager
def opened(
    manifest: Manifest, seed: int, batch_size: int, crop_px: int
) -> Iterator[tuple[PatchReader, Samples]]:
    """What `fetch` needs, for one data set. Raises UserError: a crop is larger than the patches."""
    reader, samples = reader_and_samples(manifest, seed, batch_size, crop_px)
    try:
        yield reader, samples
    finally:
        reader.close()


def reader_and_samples(
    manifest: Manifest, seed: int, batch_size: int, crop_px: int
) -> tuple[PatchReader, Samples]:
    """What `fetch` needs; the reader is the caller's to close. Raises UserError: a crop is larger than the patches."""
    layout = manifest.layout
    if layout.patch_px < crop_px:
        raise UserError(
            f"crop_px={crop_px}: the patches in {manifest.root} have {layout.patch_px} pixels; lower crop_px"
        )
    if crop_px % layout.scale:
        raise UserError(
            f"crop_px={crop_px} is not a multiple of data.scale={layout.scale}; use {crop_px - crop_px % layout.scale}"
        )
    samples = Samples(layout.patches, layout.patch_px, layout.scale, seed, batch_size, crop_px)
    return PatchReader(manifest.root, layout), samples


def _another(samples: Samples, step: int, position: int, attempt: int) -> tuple[int, int, int, int]:
    other = replace(samples, seed=samples.seed + attempt * _ATTEMPT_STRIDE)
    draws = other.of_step(step, position, position + 1)
    return int(draws.patch[0]), int(draws.y[0]), int(draws.x[0]), int(draws.flips[0])


@lru_cache(maxsize=4096)
def _name_once(shard: str, row: int, reason: str) -> None:
    logger.warning("damaged patch left out: %s, row %d: %s", shard, row, reason)
