"""Draws a figure of labeled crops in rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from pipeline.imaging.arrays import Image

_BACKGROUND, _INK, _FAINT = (255, 255, 255), (24, 28, 36), (110, 116, 128)
_GAP_PX, _MARGIN_PX, _LABEL_PX = 10, 16, 48


@dataclass(frozen=True)
class Panel:
    """One crop with its label and caption."""

    label: str
    caption: str
    crop: Image


def draw_panels(rows: Sequence[Sequence[Panel]], zoom: int) -> PillowImage.Image:
    """Rows of labeled crops on white; every pixel becomes a square of `zoom` pixels."""
    sizes = [[(p.crop.shape[1] * zoom, p.crop.shape[0] * zoom) for p in panels] for panels in rows]
    width = 2 * _MARGIN_PX + max(
        (sum(w for w, _ in row) + _GAP_PX * (len(row) - 1) for row in sizes), default=0
    )
    height = _MARGIN_PX + sum(_LABEL_PX + max(h for _, h in row) + _GAP_PX for row in sizes)
    canvas = PillowImage.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN_PX // 2
    for panels, row in zip(rows, sizes, strict=True):
        x = _MARGIN_PX
        for panel, (panel_width, _) in zip(panels, row, strict=True):
            _text(draw, (x, y + 4), panel.label, 17, _INK, panel_width)
            _text(draw, (x, y + 26), panel.caption, 14, _FAINT, panel_width)
            canvas.paste(PillowImage.fromarray(nearest_upscale(panel.crop, zoom)), (x, y + _LABEL_PX))
            x += panel_width + _GAP_PX
        y += _LABEL_PX + max(h for _, h in row) + _GAP_PX
    return canvas


def _text(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    text: str,
    size: int,
    ink: tuple[int, int, int],
    width: int,
) -> None:
    """Draws a line of text, shortened in the middle if it does not fit."""
    font = ImageFont.load_default(size)
    shown, keep = text, len(text)
    while draw.textlength(shown, font=font) > width and keep > 4:
        keep -= 1
        shown = f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}"
    draw.text(position, shown, font=font, fill=ink)


def nearest_upscale(image: Image, factor: int) -> Image:
    """Every pixel as a square of `factor` x `factor` pixels."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
