"""Low-resolution files that the user brings: which belongs to which photograph, and how they were made."""

import io

import numpy as np
from PIL import Image

from pipeline.data.ingest.layout import lr_candidates, lr_files
from pipeline.data.ingest.sources import PhotoFile
from pipeline.errors import UserError

KNOWN = ("matlab_uint8", "matlab_uint8_symmetric", "matlab_float", "pillow", "cv2_area", "cv2_cubic")
_CORNER_PX = 384  # low-resolution pixels a side that are compared
_NEAR = 0.97  # share of equal values that names a degradation


def pair_by_name(photos: list[PhotoFile], low: list[PhotoFile], scale: int) -> dict[str, PhotoFile]:
    """Low-resolution file of each photograph, by the photograph's path.

    The rule is `lr_candidates`: `0001.png` goes with `0001.png`, `0001x4.png`, `0001_LR.png` and the like, in a folder
    of the same relative name or, where that is clear, in any.

    Raises:
        UserError: two low-resolution files or two photographs with one name, or no file that fits a photograph.
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
            f"data.lr_dir: no file belongs to a photograph by name; expected names like {photos[0].stem}x{scale}.png"
        )
    return pairs


def match_degradation(hr: np.ndarray, lr: np.ndarray, scale: int) -> str:
    """Name of the known degradation (see KNOWN) that made `lr` from `hr`, or "none".

    Compares the upper left corner, edges included; the best match counts when 97 % of its values are equal.
    """
    from pipeline.imaging import matlab_bicubic_downscale

    rows, columns = min(_CORNER_PX, lr.shape[0]), min(_CORNER_PX, lr.shape[1])
    margin = 4  # low-resolution pixels beyond the corner, so that the cut itself changes nothing inside
    corner = np.ascontiguousarray(hr[: (rows + margin) * scale, : (columns + margin) * scale])
    candidates = {
        "matlab_uint8": lambda: matlab_bicubic_downscale(corner, scale, edge="replicate"),
        "matlab_uint8_symmetric": lambda: matlab_bicubic_downscale(corner, scale, edge="symmetric"),
        "matlab_float": lambda: _matlab_float(corner, scale),
        "pillow": lambda: _pillow(corner, scale),
        "cv2_area": lambda: _area(corner, scale),
        "cv2_cubic": lambda: _cubic(corner, scale),
    }
    best, best_share = "none", _NEAR
    for name in KNOWN:
        made = candidates[name]()[:rows, :columns]
        share = float((made == lr[:rows, :columns]).mean())
        if share > best_share:
            best, best_share = name, share
    return best


def _round(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def _resample(image: np.ndarray, weights: np.ndarray, scale: int, mode: str) -> np.ndarray:
    """Both axes of a float image by one kernel, the same for every output pixel; `weights` are centred on it."""
    for axis in (0, 1):
        taps = len(weights)
        before = (taps - scale) // 2
        padding = [(0, 0)] * 3
        padding[axis] = (before, taps - scale - before)
        padded = np.pad(image, padding, mode=mode)  # type: ignore[call-overload]
        length = image.shape[axis] // scale
        image = sum(
            weight * padded.take(range(tap, tap + length * scale, scale), axis)
            for tap, weight in enumerate(weights)
        )
    return image


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _matlab_float(hr: np.ndarray, scale: int) -> np.ndarray:
    """BasicSR's Python version: antialiased, mirrored edges, rounded once."""
    taps = 4 * scale + scale % 2  # as odd or even as the scale, so that they are centred
    weights = _keys((np.arange(taps) - (taps - 1) / 2) / scale, -0.5)
    return _round(_resample(hr.astype(np.float64), weights / weights.sum(), scale, "symmetric"))


def _pillow(hr: np.ndarray, scale: int) -> np.ndarray:
    image = Image.fromarray(hr)
    return np.asarray(image.resize((image.width // scale, image.height // scale), Image.Resampling.BICUBIC))


def _area(hr: np.ndarray, scale: int) -> np.ndarray:
    height, width = hr.shape[0] // scale, hr.shape[1] // scale
    blocks = hr.reshape(height, scale, width, scale, 3).mean(axis=(1, 3))
    if scale == 2:  # OpenCV rounds half up in its integer path for 2, half to even otherwise
        return _round(blocks)
    return np.clip(np.rint(blocks), 0, 255).astype(np.uint8)


def _cubic(hr: np.ndarray, scale: int) -> np.ndarray:
    """OpenCV's INTER_CUBIC: four taps around the centre, not antialiased, a = -0.75, replicated edges."""
    taps = 4 if scale % 2 == 0 else 3
    weights = _keys(np.arange(taps) - (taps - 1) / 2, -0.75)
    full = np.zeros(max(taps, scale))
    start = (len(full) - taps) // 2
    full[start : start + taps] = weights
    return _round(_resample(hr.astype(np.float64), full / full.sum(), scale, "edge"))


def read_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a file's first bytes, where they suffice."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception:  # noqa: BLE001 - only an estimate; ingest names what is wrong
        return None
