"""Low-resolution files provided by the user: pairing by name, and the degradation that made them."""

from collections.abc import Callable

import numpy as np

from pipeline.data.ingest.layout import lr_candidates, lr_files
from pipeline.data.ingest.sources import PhotoFile
from pipeline.errors import UserError

_CORNER_PX = 384  # low-resolution pixels per side that are compared
_EQUAL_SHARE = 0.97  # share of equal values above which a degradation is recognized


def pair_by_name(photos: list[PhotoFile], low: list[PhotoFile], scale: int) -> dict[str, PhotoFile]:
    """Low-resolution file of each image, by the image's path.

    The rule is `lr_candidates`: `0001.png` goes with `0001.png`, `0001x4.png`, `0001_LR.png` and the like, in a folder
    of the same relative name or, where that is clear, in any.

    Raises:
        UserError: two low-resolution files or two images with one name, or no pair at all.
    """
    fitting = set(lr_files((file.name for file in low), scale))
    hr_names = {photo.path: photo.name for photo in photos}
    files = {file.path: file for file in low if file.name in fitting and file.path not in hr_names}
    found = lr_candidates(hr_names, {path: file.name for path, file in files.items()}, scale)
    pairs: dict[str, PhotoFile] = {}
    owners: dict[str, str] = {}
    for photo, candidates in found.items():
        if len(candidates) > 1:
            first, second, *_ = (files[path].name for path in candidates)
            raise UserError(f"data.lr_dir: {first} and {second} have the same name; keep one")
        for path in candidates:
            owner = owners.setdefault(path, photo)
            if owner != photo:
                raise UserError(
                    f"data.lr_dir: {files[path].name} belongs to {owner} and to {photo}; rename one"
                )
            pairs[photo] = files[path]
    if not pairs:
        raise UserError(
            f"data.lr_dir: no file is paired with an image by name; expected names like {photos[0].stem}x{scale}.png"
        )
    return pairs


def match_degradation(hr: np.ndarray, lr: np.ndarray, scale: int) -> str:
    """The degradation that made `lr` from `hr`: `matlab_uint8`, `matlab_float` (as BasicSR's `imresize`) or `other`.

    Compares the upper left corner, with either edge; more than 97 % of its values must be equal.
    """
    from pipeline.imaging.bicubic import float_bicubic_downscale, matlab_bicubic_downscale

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
