"""Draws a contact sheet of a data set: patches next to their low-resolution versions, sorted by detail score."""

from collections.abc import Iterator
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


def contact_sheet(manifest: Manifest) -> Image.Image:
    """Pairs of low resolution (enlarged by repeating pixels) and high resolution, sorted by detail score.

    The center of each patch is shown, unscaled. `data.min_detail` is a limit on the score. Corrupt patches are skipped.
    """
    patches = sorted(_some_patches(manifest), key=lambda patch: patch[0])
    chosen = [patches[index] for index in _evenly_spaced(len(patches), _SHOWN)]
    side = min(_SIDE, manifest.patch_px) // manifest.scale * manifest.scale
    width, height = 2 * side + _GAP, side + _CAPTION + _GAP
    columns = min(_COLUMNS, max(1, len(chosen)))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * height + _GAP), _PAPER)
    font = ImageFont.load_default(size=11)
    first = (manifest.patch_px - side) // 2 // manifest.scale * manifest.scale
    for number, (detail, caption, hr, lr) in enumerate(chosen):
        left, top = _GAP + number % columns * (width + _GAP), _GAP + number // columns * height
        strip = Image.new("RGB", (width, _CAPTION), _PAPER)  # cuts a long caption
        ImageDraw.Draw(strip).text((0, 0), f"{detail:.1f}  {caption}", _INK, font)
        sheet.paste(strip, (left, top))
        enlarged = lr.repeat(manifest.scale, axis=0).repeat(manifest.scale, axis=1)
        for column, pixels in enumerate((enlarged, hr)):
            center = Image.fromarray(pixels).crop((first, first, first + side, first + side))
            sheet.paste(center, (left + column * (side + _GAP // 2), top + _CAPTION))
    return sheet


def _some_patches(manifest: Manifest) -> Iterator[tuple[float, str, np.ndarray, np.ndarray]]:
    """Detail score, caption, HR and LR of patches."""
    names = {entry["source_id"]: PurePosixPath(entry["path"]).name for entry in manifest.sources}
    reader = PatchReader(manifest)
    for number in _evenly_spaced(manifest.patches, _READ):
        try:
            cells = reader.row(*manifest.locate(number))
            hr, lr = reader.patch(number)
        except CorruptPatch:
            continue
        name = names[cells["source_id"]].encode("ascii", "backslashreplace").decode()
        yield cells["detail"], f"{name}  y {cells['y']} x {cells['x']}", hr, lr
    reader.close()


def _evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` numbers of range(count), evenly spaced, both ends included."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
