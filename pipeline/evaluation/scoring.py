"""Scores the models on one picture, and cuts out the part of it that the report shows."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.ingest.decoding import PhotoRejected, read_photo
from pipeline.errors import UserError
from pipeline.evaluation.crops import Box, most_different
from pipeline.evaluation.layout import Pair
from pipeline.evaluation.lpips import Lpips
from pipeline.evaluation.models import Model
from pipeline.imaging import bicubic_upscale, matlab_bicubic_downscale, psnr, ssim
from pipeline.storage import Storage

Pixels = NDArray[np.uint8]
METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
_SSIM_WINDOW_PX = 11
_OVERVIEW_PX = 480


@dataclass(frozen=True)
class Settings:
    """How pictures are scored and shown."""

    scale: int = 4
    border: int = 4
    tile_px: int | None = None
    crop_px: int = 128
    boxes: Mapping[str, Box] = field(default_factory=dict)
    """Crops chosen by hand, by the picture's name."""
    max_megapixels: float = 200.0


@dataclass(frozen=True)
class Scorer:
    """Scores all models on a picture; it travels to Ray's workers as a value."""

    models: Sequence[Model]
    settings: Settings
    lpips: Lpips | None = None

    def __call__(self, pair: Pair) -> dict[str, Any]:
        """
        Returns:
            `name`, and one of `refused` (the reason to exclude the image), `failed` (the reason to stop: a model's
            output is not finite, or the image is too small for LPIPS), or `metrics` (one mapping for each model) and
            `pictures`: the crop's box and its data URIs by column (lr, bicubic, each model's number, hr), and a small
            overview.
        """
        try:
            hr, lr = read_pair(pair, self.settings)
        except PhotoRejected as error:
            return {"name": pair.name, "refused": str(error)}
        try:
            results = [model.upscale(lr, self.settings.tile_px) for model in self.models]
            metrics = [self._metrics(sr, hr) for sr in results]
        except (FloatingPointError, UserError) as error:
            return {"name": pair.name, "failed": str(error)}
        return {
            "name": pair.name,
            "size": [hr.shape[1], hr.shape[0]],
            "metrics": metrics,
            "pictures": self._pictures(pair.name, lr, results, hr),
        }

    def _metrics(self, sr: Pixels, hr: Pixels) -> dict[str, float]:
        border = self.settings.border
        values = {
            "psnr_y": psnr(sr, hr, border, "y"),
            "ssim_y": ssim(sr, hr, border, "y"),
            "psnr_rgb": psnr(sr, hr, border, "rgb"),
            "ssim_rgb": ssim(sr, hr, border, "rgb"),
        }
        if self.lpips is not None:
            values["lpips"] = self.lpips(sr, hr, border)
        return values

    def _pictures(self, name: str, lr: Pixels, results: Sequence[Pixels], hr: Pixels) -> dict[str, Any]:
        scale = self.settings.scale
        bicubic = next(
            (sr for model, sr in zip(self.models, results, strict=True) if model.generator is None), None
        )
        bicubic = bicubic_upscale(lr, scale) if bicubic is None else bicubic
        compared = (
            list(results) if len(results) > 1 else [bicubic, hr if results[0] is bicubic else results[0]]
        )
        chosen = self.settings.boxes.get(name)
        box = (
            chosen.fitted(hr.shape, scale)
            if chosen
            else most_different(compared, self.settings.crop_px, scale)
        )
        overview = Image.fromarray(hr)
        overview.thumbnail((_OVERVIEW_PX, _OVERVIEW_PX))
        return {
            "box": [box.x, box.y, box.width, box.height],
            "lr": data_uri(box.of(lr, scale)),
            "bicubic": data_uri(box.of(bicubic)),
            "models": [data_uri(box.of(sr)) for sr in results],
            "hr": data_uri(box.of(hr)),
            "overview": _encoded(overview, "JPEG", quality=80),
        }


def read_pair(pair: Pair, settings: Settings) -> tuple[Pixels, Pixels]:
    """An original, cut to a multiple of the scale, and its low-resolution version.

    Without a low-resolution file the original is degraded as MATLAB's bicubic does it. With one, the original may be
    up to a pixel short of the scale larger than `scale` times the file; it is cut.

    Raises:
        PhotoRejected: with the reason.
    """
    scale = settings.scale
    hr = _read(pair.hr, settings)
    if pair.lr is None:
        height, width = (size // scale * scale for size in hr.shape[:2])
        _require_size(height, width, settings)
        hr = np.ascontiguousarray(hr[:height, :width])
        return hr, matlab_bicubic_downscale(hr, scale)
    lr = _read(pair.lr, settings)
    height, width = (size * scale for size in lr.shape[:2])
    if not (0 <= hr.shape[0] - height < scale and 0 <= hr.shape[1] - width < scale):
        raise PhotoRejected(size_mismatch((hr.shape[1], hr.shape[0]), (lr.shape[1], lr.shape[0]), scale))
    _require_size(height, width, settings)
    return np.ascontiguousarray(hr[:height, :width]), lr


def size_mismatch(hr: tuple[int, int], lr: tuple[int, int], scale: int) -> str:
    """The reason why two sizes (width, height) do not belong together."""
    return (
        f"its {hr[0]} x {hr[1]} pixels are not {scale} times the low-resolution file's {lr[0]} x {lr[1]} "
        f"({lr[0] * scale} x {lr[1] * scale} expected)"
    )


def data_uri(pixels: Pixels) -> str:
    """A picture as a lossless WebP, ready for an HTML page."""
    return _encoded(Image.fromarray(np.ascontiguousarray(pixels)), "WEBP", lossless=True, method=4)


def _encoded(image: Image.Image, form: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _read(path: str, settings: Settings) -> Pixels:
    folder, _, name = path.rpartition("/")
    try:
        return read_photo(Storage(folder or "/").read_bytes(name), settings.max_megapixels).pixels
    except PhotoRejected as error:
        raise PhotoRejected(f"{name}: {error}") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise PhotoRejected(f"{name}: cannot be read ({str(error).splitlines()[0]})") from None


def _require_size(height: int, width: int, settings: Settings) -> None:
    least = 2 * settings.border + _SSIM_WINDOW_PX
    if min(height, width) < least:
        raise PhotoRejected(
            f"{width} x {height} pixels are too few for border={settings.border} (at least {least})"
        )
