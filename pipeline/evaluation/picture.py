"""Comparison pictures: labelled crops in rows, for the README, the demo and MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.evaluation.crops import Box, enlarged, most_different
from pipeline.imaging import luma, psnr

Pixels = NDArray[np.uint8]

_BACKGROUND, _INK, _FAINT = (255, 255, 255), (24, 28, 36), (110, 116, 128)
_GAP_PX, _MARGIN_PX, _LABEL_PX = 10, 16, 48


@dataclass(frozen=True)
class Panel:
    """One crop with what stands above it."""

    label: str
    caption: str
    crop: Pixels


def comparison_picture(
    columns: Mapping[str, Pixels], box: Box | None = None, crop_px: int = 96, zoom: int = 3, border: int = 4
) -> Image.Image:
    """Crops of one photograph side by side, with labels and Y-PSNR.

    Args:
        columns: label to uint8 RGB; the last one is the original. Smaller images are enlarged without smoothing.
        box: the part to show; without one, where the columns differ most from each other.
        crop_px: side of the crop in the original's pixels.
        zoom: each pixel becomes a square of so many pixels.
        border: pixels left out of the PSNR, which is over the whole image.

    Raises:
        ValueError: an image whose size is not the original's, or a whole fraction of it.
    """
    return draw_panels([_panels(columns, box, crop_px, border)], zoom)


def save_comparison(
    path: str | Path,
    rows: Sequence[Mapping[str, Pixels]],
    boxes: Sequence[Box | None] | None = None,
    crop_px: int = 96,
    zoom: int = 3,
    border: int = 4,
) -> None:
    """Writes a PNG with one row for each photograph: label to uint8 RGB, the original last; see comparison_picture."""
    chosen = boxes or [None] * len(rows)
    panels = [_panels(columns, box, crop_px, border) for columns, box in zip(rows, chosen, strict=True)]
    draw_panels(panels, zoom).save(path, format="PNG", optimize=True)


def draw_panels(rows: Sequence[Sequence[Panel]], zoom: int) -> Image.Image:
    """Rows of labelled crops on white; every pixel becomes a square of `zoom` pixels."""
    sizes = [[(p.crop.shape[1] * zoom, p.crop.shape[0] * zoom) for p in panels] for panels in rows]
    width = 2 * _MARGIN_PX + max(sum(w for w, _ in row) + _GAP_PX * (len(row) - 1) for row in sizes)
    height = _MARGIN_PX + sum(_LABEL_PX + max(h for _, h in row) + _GAP_PX for row in sizes)
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN_PX // 2
    for panels, row in zip(rows, sizes, strict=True):
        x = _MARGIN_PX
        for panel, (panel_width, _) in zip(panels, row, strict=True):
            _text(draw, (x, y + 4), panel.label, 17, _INK, panel_width)
            _text(draw, (x, y + 26), panel.caption, 14, _FAINT, panel_width)
            canvas.paste(Image.fromarray(enlarged(panel.crop, zoom)), (x, y + _LABEL_PX))
            x += panel_width + _GAP_PX
        y += _LABEL_PX + max(h for _, h in row) + _GAP_PX
    return canvas


def _panels(columns: Mapping[str, Pixels], box: Box | None, crop_px: int, border: int) -> list[Panel]:
    original = list(columns.values())[-1]
    step = max(original.shape[0] // image.shape[0] for image in columns.values())
    images = {label: _to_size_of(original, image) for label, image in columns.items()}
    chosen = (box or _default_box(list(images.values()), crop_px, step)).fitted(original.shape, step)
    return [
        Panel(
            label,
            "" if image is original else f"{psnr(np.ascontiguousarray(image), original, border):.2f} dB",
            chosen.of(image),
        )
        for label, image in images.items()
    ]


def _to_size_of(original: Pixels, image: Pixels) -> Pixels:
    factor = original.shape[0] // image.shape[0]
    image = image if factor == 1 else enlarged(image, factor)
    if image.shape != original.shape:
        raise ValueError(f"a column of {image.shape} does not fit an original of {original.shape}")
    return image


def _default_box(images: Sequence[Pixels], crop_px: int, step: int) -> Box:
    if len(images) > 1:
        return most_different(images, crop_px, step)
    # Alone: where it departs most from its own mean.
    flat = np.full_like(images[0], int(luma(images[0]).mean()))
    return most_different([images[0], flat], crop_px, step)


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    ink: tuple[int, int, int],
    width: int,
) -> None:
    """A line of text, shortened in the middle where it does not fit."""
    font = ImageFont.load_default(size)
    shown, keep = text, len(text)
    while draw.textlength(shown, font=font) > width and keep > 4:
        keep -= 1
        shown = f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}"
    draw.text(place, shown, font=font, fill=ink)
