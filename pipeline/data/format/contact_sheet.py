"""Draws a contact sheet of a data set: patches beside their low-resolution versions, from flat to detailed."""

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.format.manifest import Manifest
from pipeline.data.format.reader import DamagedPatch, PatchReader

_LOOKED_AT = 96  # patches, spread over the data set
_SHOWN = 24  # of these, spread over their scores
_COLUMNS = 3
_SIDE = 192  # pixels of a patch that are shown, unscaled
_GAP, _CAPTION = 8, 16
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class _Patch:
    hr: np.ndarray
    lr: np.ndarray
    detail: float
    caption: str


def contact_sheet(manifest: Manifest) -> Image.Image:
    """Pairs of low resolution (pixels enlarged, without smoothing) and high resolution, sorted by detail score.

    Of each patch the middle is shown, pixel for pixel. The score is what `data.min_detail` compares with. Damaged
    patches are left out.
    """
    patches = sorted(_some_patches(manifest), key=lambda patch: patch.detail)
    chosen = [patches[place] for place in _spread(len(patches), _SHOWN)]
    side = min(_SIDE, manifest.patch_px) // manifest.scale * manifest.scale
    width, height = 2 * side + _GAP, side + _CAPTION + _GAP
    columns = min(_COLUMNS, max(1, len(chosen)))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * height + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number, patch in enumerate(chosen):
        left, top = _GAP + number % columns * (width + _GAP), _GAP + number // columns * height
        draw.text((left, top), _fitted(patch.caption, font, width), _INK, font)
        enlarged = patch.lr.repeat(manifest.scale, axis=0).repeat(manifest.scale, axis=1)
        for place, pixels in enumerate((enlarged, patch.hr)):
            middle = _middle(pixels, side, manifest.scale)
            sheet.paste(Image.fromarray(middle), (left + place * (side + _GAP // 2), top + _CAPTION))
    return sheet


def _some_patches(manifest: Manifest) -> list[_Patch]:
    names = {entry["source_id"]: PurePosixPath(entry["path"]).name for entry in manifest.sources}
    reader = PatchReader(manifest.root, manifest.layout)
    found = []
    for number in _spread(manifest.patches, _LOOKED_AT):
        try:
            cells = reader.row(*manifest.layout.locate(number))
            hr, lr = reader.patch(number)
        except DamagedPatch:
            continue
        name = names[cells["source_id"]].encode("ascii", "backslashreplace").decode()
        caption = f"{cells['detail']:.1f}  {name}  y {cells['y']} x {cells['x']}"
        found.append(_Patch(hr, lr, cells["detail"], caption))
    reader.close()
    return found


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly spread, both ends among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _middle(pixels: np.ndarray, side: int, scale: int) -> np.ndarray:
    first = (pixels.shape[0] - side) // 2 // scale * scale
    return np.ascontiguousarray(pixels[first : first + side, first : first + side])


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
