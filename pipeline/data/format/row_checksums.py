"""A fast 64-bit checksum of every row of pixels, so that a crop is verified without reading the whole patch.

The checksum of a row is the sum over its little-endian 64-bit words w[i] * k[i] mod 2**64, the row padded with zeros to
full words, with k[i] = splitmix64(i) | 1. An odd factor has an inverse, so a change within one word is always detected;
any other change is missed with a probability of about 2**-64. Row checksums detect accidents; forgery is detected by
the sha256 of the shards.
"""

from functools import lru_cache

import numpy as np

WORD = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea, Flood, 2014) on an array of uint64: a fixed, well-distributed hash."""
    values = values + _GOLDEN
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def row_checksums(rows: np.ndarray) -> np.ndarray:
    """uint64 (n,) checksums of uint8 (n, bytes) rows."""
    padding = -rows.shape[1] % WORD
    if padding:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    words = np.ascontiguousarray(rows).view("<u8")
    return np.einsum("ij,j->i", words, _factors(words.shape[1]))


def patch_checksums(hr: np.ndarray, lr: np.ndarray) -> np.ndarray:
    """uint64 (..., H + h): checksums of the rows of uint8 (..., H, W, 3) and (..., h, w, 3), hr first."""
    sums = [row_checksums(images.reshape(-1, 3 * images.shape[-2])) for images in (hr, lr)]
    return np.concatenate(
        [part.reshape(images.shape[:-2]) for part, images in zip(sums, (hr, lr), strict=True)], axis=-1
    )


def pack(patch_id: int, sums: np.ndarray) -> bytes:
    """The `row_checksums` column of a patch: its row checksums, then a seal over those and the patch id."""
    return np.concatenate([sums, _seal(patch_id, sums)]).astype("<u8").tobytes()


def unpack(patch_id: int, data: np.ndarray) -> np.ndarray:
    """uint64 row checksums from the column's bytes (uint8). Raises ValueError: the seal does not match."""
    words = np.ascontiguousarray(data).view("<u8")
    sums = words[:-1]
    if words[-1] != _seal(patch_id, sums)[0]:
        raise ValueError("column row_checksums: seal mismatch")
    return sums


def _seal(patch_id: int, sums: np.ndarray) -> np.ndarray:
    words = np.concatenate([sums, np.array([patch_id], np.uint64)])
    return np.einsum("j,j->", words, _factors(len(words))).reshape(1)


@lru_cache(maxsize=16)
def _factors(words: int) -> np.ndarray:
    return splitmix64(np.arange(words, dtype=np.uint64)) | np.uint64(1)
