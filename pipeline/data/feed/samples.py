"""Patch, crop and flip of each sample of a training step: a pure function of (seed, step, manifest).

Sample number n = step * batch_size + position. Epoch n // patches is a permutation of all patches, computed by a
Feistel network over the patch numbers with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002). Nothing is stored or shuffled: sample one million costs as much as sample zero, in constant memory, on any rank.
Crops, flips and channel orders are hashes of (seed, n). Batches run across the end of an epoch.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from pipeline.data.format.row_checksums import splitmix64

_ROUNDS = 6
_CHANNEL_ORDERS = np.array(list(permutations(range(3))), np.int64)
# Separate hash streams for separate purposes.
_ORDER, _CROP_Y, _CROP_X, _FLIPS, _CHANNELS = 1, 2, 3, 4, 5


def keyed(seed: int, stream: int, counters: np.ndarray) -> np.ndarray:
    """uint64 hashes of (seed, stream, counter)."""
    return splitmix64(splitmix64(counters.astype(np.uint64)) ^ _key(seed, stream))


@lru_cache(maxsize=64)
def _key(seed: int, stream: int) -> np.uint64:
    return splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.uint64(stream))[0]


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Position `index` of a permutation of range(size) that depends on `keys`.

    Args:
        index: int64, 0 <= index < size.
        size: length of the permutation.
        keys: uint64, one per index.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    values = index.astype(np.uint64)
    round_keys = splitmix64(keys ^ np.arange(_ROUNDS, dtype=np.uint64)[:, None])
    outside = np.arange(len(values))
    # The network permutes 4 ** half >= size numbers. Cycle walking: indices outside the range are encrypted again.
    while len(outside):
        left, right = values[outside] >> shift, values[outside] & mask
        for key in round_keys[:, outside]:
            left, right = right, left ^ (splitmix64(right ^ key) & mask)
        values[outside] = (left << shift) | right
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64)


def rank_share(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, last) positions of the global batch for one rank; shares are contiguous and differ by at most one."""
    return batch_size * rank // world_size, batch_size * (rank + 1) // world_size


def channel_orders(seed: int, batch_size: int, step: int, first: int, last: int) -> np.ndarray:
    """A permutation of red, green and blue for each sample at positions first..last of the batch of `step`.

    All six are equally likely (RGB shuffle, as in Feng et al., "Suppressing model overfitting for image
    super-resolution networks", 2019).

    Returns:
        (last - first, 3), int64: the source channel of each channel.
    """
    numbers = np.arange(step * batch_size + first, step * batch_size + last, dtype=np.int64)
    return _CHANNEL_ORDERS[_below(keyed(seed, _CHANNELS, numbers), np.uint64(len(_CHANNEL_ORDERS)))]


@dataclass(frozen=True)
class Draws:
    """Samples of one rank in one step; arrays of equal length."""

    patch: np.ndarray  # int64 patch_id
    y: np.ndarray  # int64, high-resolution pixels inside the patch, multiples of the scale
    x: np.ndarray
    flips: np.ndarray  # uint8: bit 0 horizontal flip, bit 1 vertical flip, bit 2 transpose (applied last)


@dataclass(frozen=True)
class Samples:
    """The infinite sequence of samples of (seed, batch size, data set)."""

    patches: int
    patch_px: int
    scale: int
    seed: int
    batch_size: int
    crop_px: int

    def of_step(self, step: int, first: int = 0, last: int | None = None) -> Draws:
        """Samples at positions first..last of the global batch of `step`."""
        last = self.batch_size if last is None else last
        numbers = np.arange(step * self.batch_size + first, step * self.batch_size + last, dtype=np.int64)
        epoch, index = numbers // self.patches, numbers % self.patches
        offsets = np.uint64((self.patch_px - self.crop_px) // self.scale + 1)
        flips = (keyed(self.seed, _FLIPS, numbers) >> np.uint64(61)).astype(np.uint8)
        return Draws(
            patch=permute(index, self.patches, keyed(self.seed, _ORDER, epoch)),
            y=_below(keyed(self.seed, _CROP_Y, numbers), offsets) * self.scale,
            x=_below(keyed(self.seed, _CROP_X, numbers), offsets) * self.scale,
            flips=flips,
        )


def _below(hashes: np.ndarray, limit: np.uint64) -> np.ndarray:
    """int64 in [0, limit) from the upper 32 bits of each hash; the bias is below limit / 2**32."""
    return (((hashes >> np.uint64(32)) * limit) >> np.uint64(32)).astype(np.int64)
