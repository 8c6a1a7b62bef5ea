"""One worker's part of one training step: samples read, verified, cropped and flipped."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.feed.samples import Samples
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.reader import CorruptPatch, PatchReader
from pipeline.errors import UserError

# Consecutive corrupt draws for one sample before giving up: by then nearly the whole data set must be corrupt.
ATTEMPTS = 16
# An object store answers in tens of milliseconds: that many concurrent requests and steps hide it at 20 steps/s.
REQUESTS = 24
CONCURRENT_STEPS = 3
# Replacements use seeds offset by multiples of this, so that they never equal a seed that a user chose.
_ATTEMPT_STRIDE = 2**40

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawBatch:
    """One worker's part of a step; pixels stay uint8 until they are on the device."""

    lr: NDArray[np.uint8]
    """(B, h, w, 3)."""
    hr: NDArray[np.uint8]
    """(B, h * scale, w * scale, 3)."""
    corrupt: int
    """Corrupt patches that were drawn and replaced."""


def fetch_steps(
    reader: PatchReader,
    samples: Samples,
    steps: Sequence[int],
    first: int,
    last: int,
    pinned: bool = False,
) -> Generator[RawBatch, None, None]:
    """The result of `fetch` for each of `steps`, in order; from an object store, several are fetched concurrently.

    Raises:
        UserError, StoreUnreachable: as `fetch`.
    """
    if not reader.remote:
        for step in steps:
            yield fetch(reader, samples, step, first, last, pinned=pinned)
        return
    requests, steps_pool = ThreadPoolExecutor(REQUESTS), ThreadPoolExecutor(CONCURRENT_STEPS)
    pending: deque[Future[RawBatch]] = deque()
    try:
        for step in steps:
            pending.append(
                steps_pool.submit(fetch, reader, samples, step, first, last, requests.map, pinned=pinned)
            )
            if len(pending) == CONCURRENT_STEPS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        steps_pool.shutdown(cancel_futures=True)
        requests.shutdown()


def fetch(
    reader: PatchReader,
    samples: Samples,
    step: int,
    first: int,
    last: int,
    for_each: Callable[[Callable[[int], int], Iterable[int]], Iterable[int]] = map,
    pinned: bool = False,
) -> RawBatch:
    """Samples at positions first..last of the global batch of `step`.

    A corrupt patch is logged once, counted, and replaced by a draw that depends on (seed, step, position, attempt)
    only, so that every rank replaces it by the same one.

    Args:
        for_each: `map`, or that of an executor whose threads fetch the samples concurrently.
        pinned: allocate the batch in pinned memory, which a GPU reads without waiting for the host.

    Raises:
        UserError: ATTEMPTS consecutive draws were corrupt.
        StoreUnreachable: the object store is unreachable.
    """
    count, side, scale = last - first, samples.crop_px, samples.scale
    hr = empty_images((count, side, side, 3), pinned)
    lr = empty_images((count, side // scale, side // scale, 3), pinned)
    draws = samples.of_step(step, first, last)
    positions = list(
        zip(draws.patch.tolist(), draws.y.tolist(), draws.x.tolist(), draws.flips.tolist(), strict=True)
    )

    def fill(index: int) -> int:
        """Fills one sample in; returns the number of corrupt patches drawn for it."""
        (patch, y, x, flips), corrupt = positions[index], 0
        while True:
            try:
                crops = reader.crop(patch, y, x, side)
                break
            except CorruptPatch as error:
                corrupt += 1
                _log_once(error.shard, error.row, error.reason)
                if corrupt == ATTEMPTS:
                    raise UserError(
                        f"{error}; {corrupt} consecutive patches are corrupt: check with prepare_data.py --verify, "
                        "and prepare the data set again"
                    ) from None
            patch, y, x, flips = _replacement(samples, step, first + index, corrupt)
        for out, crop in zip((hr[index], lr[index]), crops, strict=True):
            put_flipped(out, crop, flips)
        return corrupt

    corrupt = sum(for_each(fill, range(count)))
    return RawBatch(lr, hr, corrupt)


def empty_images(shape: tuple[int, ...], pinned: bool) -> NDArray[np.uint8]:
    """An uninitialized array, in pinned memory if that is requested (which needs a GPU)."""
    if not pinned:
        return np.empty(shape, np.uint8)
    import torch  # Ray Data's tasks do without

    # torch's allocator keeps the memory until copies from it have finished.
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()


def flipped(pixels: np.ndarray, flips: int) -> np.ndarray:
    """A view of (h, w, 3): bit 0 flips left-right, bit 1 up-down, bit 2 transposes afterwards."""
    if flips & 1:
        pixels = pixels[:, ::-1]
    if flips & 2:
        pixels = pixels[::-1]
    if flips & 4:
        pixels = pixels.transpose(1, 0, 2)
    return pixels


def put_flipped(out: np.ndarray, pixels: np.ndarray, flips: int) -> None:
    """out = flipped(pixels, flips). Copies per channel when the view is not row-contiguous (3x faster in numpy)."""
    view = flipped(pixels, flips)
    if flips & 5:
        for channel in range(view.shape[2]):
            out[..., channel] = view[..., channel]
    else:
        out[...] = view


def opened(manifest: Manifest, seed: int, batch_size: int, crop_px: int) -> tuple[PatchReader, Samples]:
    """Reader (closed by the caller) and samples of a data set. Raises UserError: the crop does not fit the patches."""
    if manifest.patch_px < crop_px:
        raise UserError(
            f"crop_px={crop_px}: the patches in {manifest.root} have {manifest.patch_px} pixels; lower crop_px"
        )
    if extra := crop_px % manifest.scale:
        raise UserError(
            f"crop_px={crop_px} is not a multiple of data.scale={manifest.scale}; use {crop_px - extra}"
        )
    samples = Samples(manifest.patches, manifest.patch_px, manifest.scale, seed, batch_size, crop_px)
    return PatchReader(manifest), samples


def _replacement(samples: Samples, step: int, position: int, attempt: int) -> tuple[int, int, int, int]:
    reseeded = replace(samples, seed=samples.seed + attempt * _ATTEMPT_STRIDE)
    draws = reseeded.of_step(step, position, position + 1)
    return int(draws.patch[0]), int(draws.y[0]), int(draws.x[0]), int(draws.flips[0])


@lru_cache(maxsize=4096)
def _log_once(shard: str, row: int, reason: str) -> None:
    logger.warning("replacing corrupt patch %s, row %d: %s", shard, row, reason)
