"""Draws a contact sheet of a data set: patches next to their low-resolution versions, sorted by detail score."""

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.format.manifest import Manifest
from pipeline.data.format.reader import CorruptPatch, PatchReader

_READ = 96  # patches, evenly spaced over the data set
_SHOWN = 24  # of these, evenly spaced over their scores
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
    """Pairs of low resolution (enlarged by repeating pixels) and high resolution, sorted by detail score.

    The center of each patch is shown, unscaled. `data.min_detail` is a limit on the score. Corrupt patches are skipped.
    """
    patches = sorted(_some_patches(manifest), key=lambda patch: patch.detail)
    chosen = [patches[index] for index in _evenly_spaced(len(patches), _SHOWN)]
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
        for column, pixels in enumerate((enlarged, patch.hr)):
            center = _center(pixels, side, manifest.scale)
            sheet.paste(Image.fromarray(center), (left + column * (side + _GAP // 2), top + _CAPTION))
    return sheet


def _some_patches(manifest: Manifest) -> list[_Patch]:
    names = {entry["source_id"]: PurePosixPath(entry["path"]).name for entry in manifest.sources}
    reader = PatchReader(manifest)
    patches = []
    for number in _evenly_spaced(manifest.patches, _READ):
        try:
            cells = reader.row(*manifest.locate(number))
            hr, lr = reader.patch(number)
        except CorruptPatch:
            continue
        name = names[cells["source_id"]].encode("ascii", "backslashreplace").decode()
        caption = f"{cells['detail']:.1f}  {name}  y {cells['y']} x {cells['x']}"
        patches.append(_Patch(hr, lr, cells["detail"], caption))
    reader.close()
    return patches


def _evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` numbers of range(count), evenly spaced, both ends included."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def _center(pixels: np.ndarray, side: int, scale: int) -> np.ndarray:
    first = (pixels.shape[0] - side) // 2 // scale * scale
    return np.ascontiguousarray(pixels[first : first + side, first : first + side])


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
