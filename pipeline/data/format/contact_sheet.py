"""Draws a contact sheet of a data set: patches next to their low-resolution versions, sorted by detail score."""

from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from pipeline.data.format.manifest import Manifest
from pipeline.data.format.reader import CorruptPatch, PatchReader
from pipeline.imaging.panels import Panel, draw_panels, nearest_upscale

_READ = 96  # patches, evenly spaced over the data set
_SHOWN = 24  # of these, evenly spaced over their scores
_COLUMNS = 3
_SIDE = 192  # pixels of a patch that are shown, unscaled


def contact_sheet(manifest: Manifest) -> Image.Image:
    """Pairs of low resolution (enlarged by repeating pixels) and high resolution, sorted by detail score.

    The center of each patch is shown, unscaled. `data.min_detail` is a limit on the score. Corrupt patches are skipped.
    """
    patches = sorted(_some_patches(manifest), key=lambda patch: patch[0])
    scale = manifest.scale
    side = min(_SIDE, manifest.patch_px) // scale * scale
    first = (manifest.patch_px - side) // 2 // scale * scale
    center = slice(first, first + side)
    panels = []
    for index in _evenly_spaced(len(patches), _SHOWN):
        detail, caption, hr, lr = patches[index]
        panels.append(Panel(f"{detail:.1f}", caption, nearest_upscale(lr, scale)[center, center]))
        panels.append(Panel("", "", hr[center, center]))
    of_row = 2 * _COLUMNS
    return draw_panels([panels[at : at + of_row] for at in range(0, len(panels), of_row)], zoom=1)


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
