"""A fast 64-bit check of every row of pixels, so that a crop is verified without reading the whole patch.

The check of a row is the sum over its little-endian 64-bit words w[i] * k[i] mod 2**64, the row padded with zeros to
whole words, with k[i] = splitmix64(i) | 1. An odd factor has an inverse, so a change within one word never goes unseen;
any other change goes unseen with a chance of about 2**-64. It guards against accidents, not against forgery:
that is what the shards' sha256 is for.
"""

from functools import lru_cache

import numpy as np

WORD = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood, 2014) on an array of uint64: a fixed, well-spread hash."""
    values = values + _GOLDEN
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=16)
def factors(words: int) -> np.ndarray:
    """uint64 (words,): the odd factors."""
    return splitmix64(np.arange(words, dtype=np.uint64)) | np.uint64(1)


def row_checks(rows: np.ndarray) -> np.ndarray:
    """uint64 (n,) checks of uint8 (n, bytes) rows."""
    extra = -rows.shape[1] % WORD
    if extra:
        rows = np.pad(rows, ((0, 0), (0, extra)))
    words = np.ascontiguousarray(rows).view("<u8")
    return np.einsum("ij,j->i", words, factors(words.shape[1]))


def pack_seal(patch_id: int, body: np.ndarray) -> bytes:
    """The `checks` column of a patch: the checks of its rows (hr, then lr), then one over those and the patch id."""
    return np.concatenate([body, _seal(patch_id, body)]).astype("<u8").tobytes()


def unpack_checks(patch_id: int, data: np.ndarray) -> np.ndarray | None:
    """uint64 row checks from the column's bytes (uint8); None where they are damaged or of another patch."""
    words = np.ascontiguousarray(data).view("<u8")
    body = words[:-1]
    return body if words[-1] == _seal(patch_id, body)[0] else None


def _seal(patch_id: int, body: np.ndarray) -> np.ndarray:
    words = np.concatenate([body, np.array([patch_id], np.uint64)])
    return np.einsum("j,j->", words, factors(len(words))).reshape(1)
