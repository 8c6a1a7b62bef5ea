"""Scores the models on one image, and encodes the crops that the report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image as PillowImage

from pipeline.data.ingest.decoding import PhotoRejected
from pipeline.data.ingest.image_set import Pair, Rejected, read_pair
from pipeline.errors import UserError
from pipeline.evaluation.crops import Box, most_different
from pipeline.evaluation.models import Model, choose_device
from pipeline.imaging import Image, bicubic_upscale
from pipeline.imaging.arrays import encoded
from pipeline.metrics import MetricSet

_OVERVIEW_PX = 480


@dataclass(frozen=True)
class Settings:
    """How images are scored and shown."""

    scale: int = 4
    border: int = 4
    tile_px: int | None = None
    crop_px: int = 128
    boxes: Mapping[str, Box] = field(default_factory=dict)
    """Crops chosen by the user, by the image's name."""


@dataclass(frozen=True)
class ImageScore:
    """Metrics and crops of one image.

    The crops are encoded once, where the pixels are: a large set's crops are kept until the report is written, and
    would need ten times the memory as arrays.
    """

    name: str
    size: tuple[int, int]
    """Width and height in pixels, HR."""
    metrics: list[dict[str, float]]
    """For each model."""
    baseline: dict[str, float]
    """The same metrics of bicubic upscaling."""
    box: Box
    lr: bytes
    """Crop as lossless WebP, like `bicubic`, `hr` and each of `sr`."""
    bicubic: bytes
    hr: bytes
    sr: list[bytes]
    """For each model."""
    overview: bytes
    """The whole image as a small JPEG."""


@dataclass(frozen=True)
class Scorer:
    """Scores all models on an image; Ray's workers receive it as a value."""

    models: Sequence[Model]
    settings: Settings
    metrics: MetricSet
    """With the border of `settings`."""
    device: str = "cpu"
    """A torch device for the metrics; auto: a GPU if the computing process has one."""

    def __call__(self, pair: Pair) -> ImageScore | Rejected:
        """The score, or the reason why there is none.

        Raises:
            UserError: a model's output is not finite, or the image is too small for a metric.
        """
        scale = self.settings.scale
        try:
            hr, lr = read_pair(pair, scale, self.settings.border)
        except PhotoRejected as error:
            return Rejected(pair.hr, str(error))
        try:
            results = [model.upscale(lr, self.settings.tile_px) for model in self.models]
            bicubic = bicubic_upscale(lr, scale)
            # Here, because Ray's workers are other processes.
            measure = self.metrics.to(choose_device("auto") if self.device == "auto" else self.device).measure
            baseline, *metrics = [measure(sr[None], hr[None], lr[None])[0] for sr in (bicubic, *results)]
        except (FloatingPointError, UserError) as error:
            raise UserError(f"{pair.hr}: {error}") from None
        except torch.OutOfMemoryError:
            raise UserError(
                f"{pair.hr}: the GPU has too little memory; lower --tile, or use --device cpu"
            ) from None
        box = self._box(pair.name, results, bicubic, hr)
        overview = PillowImage.fromarray(hr)
        overview.thumbnail((_OVERVIEW_PX, _OVERVIEW_PX))
        return ImageScore(
            name=pair.name,
            size=(hr.shape[1], hr.shape[0]),
            metrics=metrics,
            baseline=baseline,
            box=box,
            lr=_webp(box.of(lr, scale)),
            bicubic=_webp(box.of(bicubic)),
            hr=_webp(box.of(hr)),
            sr=[_webp(box.of(sr)) for sr in results],
            overview=encoded(overview, "JPEG", quality=80),
        )

    def _box(self, name: str, results: Sequence[Image], bicubic: Image, hr: Image) -> Box:
        """The user's crop, or where the models (a single one and bicubic, or the original) differ most."""
        if name in self.settings.boxes:
            return self.settings.boxes[name].fitted(hr.shape, self.settings.scale)
        compared = (
            results if len(results) > 1 else [bicubic, hr if self.models[0].generator is None else results[0]]
        )
        return most_different(compared, self.settings.crop_px, self.settings.scale)


def _webp(pixels: Image) -> bytes:
    return encoded(pixels, "WEBP", lossless=True, method=4)
