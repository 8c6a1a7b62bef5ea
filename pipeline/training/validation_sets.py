"""The sets of images that a run is validated on: the data set's held-out images, and those of `validation.sets`.

The driver finds and reads the files before Ray starts, so that unusable ones are refused at once. Workers get the list
as plain values, and read an image when they first need its pixels: a rank reads only those that it measures or shows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.data import HeldOutPhoto, load_manifest, read_held_out
from pipeline.data.ingest.cutting import pixels_sha256
from pipeline.data.ingest.decoding import PhotoRejected
from pipeline.data.ingest.image_set import Pair, find_pairs, read_pair
from pipeline.errors import UserError
from pipeline.imaging import Image
from pipeline.metrics import MetricSet
from pipeline.training.config import TrainConfig
from pipeline.training.selection import measured_metrics, metric_key
from pipeline.training.validation_config import HELD_OUT, SetFolders


@dataclass(frozen=True)
class ImageFile:
    """An image of `validation.sets` with the interface of HeldOutPhoto, read when its pixels are first needed."""

    files: Pair
    field: str
    """What errors call its set."""
    scale: int
    shape: tuple[int, int]
    """Height and width of the HR image, in pixels."""
    sha256: str
    """Of the pixels in the files, as the driver found them."""

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def hr(self) -> Image:
        return self._pixels[0]

    @property
    def lr(self) -> Image:
        return self._pixels[1]

    @cached_property
    def _pixels(self) -> tuple[Image, Image]:
        hr, lr, sha256 = _read(self.files, self.field, self.scale)
        if sha256 != self.sha256:
            raise UserError(
                f"{self.field}: {self.files.hr} has changed since the run was started; start it again"
            )
        return hr, lr


ValidationImage = HeldOutPhoto | ImageFile


@dataclass(frozen=True)
class ValidationSet:
    """A set of images with its name, `held_out` or one of `validation.sets`."""

    name: str
    images: Sequence[ValidationImage]
    sha256: str = ""
    """Digest of the images."""

    def key(self, metric: str) -> str:
        """The name of a metric on this set among a validation's metrics."""
        return metric_key(self.name, metric)


def file_set(name: str, images: Sequence[ImageFile]) -> ValidationSet:
    """A set of `validation.sets`; its digest does not depend on the images' names."""
    digests = "".join(sorted(image.sha256 for image in images))
    return ValidationSet(name, images, hashlib.sha256(digests.encode()).hexdigest())


def find_sets(config: TrainConfig) -> list[ValidationSet]:
    """Finds and reads the images of `validation.sets`, in the driver.

    Raises:
        UserError: a folder does not exist or has no pairs, or an image cannot be used; the message names the set. Or
            the weights of a metric are missing or corrupt.
    """
    sets = config.validation.sets
    if not sets:
        return []
    scale, folder = config.data.scale, config.validation.weights_folder
    metrics = MetricSet(measured_metrics(config), "cpu", scale, folder)
    return [_find(name, folders, scale, metrics) for name, folders in sets.items()]


def open_sets(config: TrainConfig, found: Sequence[ValidationSet]) -> list[ValidationSet]:
    """All sets of a run: the held-out images, if any, and `found`. Raises UserError: the data set is corrupt."""
    manifest = load_manifest(config.data.root)
    held_out = read_held_out(manifest)
    return [*([ValidationSet(HELD_OUT, held_out, manifest.held_out_sha256)] if held_out else []), *found]


def deciding_images(config: TrainConfig, sets: Sequence[ValidationSet]) -> str:
    """Digest of the images of `validation.select_on`; empty if they are not in `sets`."""
    return next((each.sha256 for each in sets if each.name == config.validation.select_on), "")


def all_images(sets: Sequence[ValidationSet]) -> str:
    """Digest of the images of all sets."""
    return hashlib.sha256("".join(f"{each.name} {each.sha256};" for each in sets).encode()).hexdigest()


def _find(name: str, folders: str | SetFolders, scale: int, metrics: MetricSet) -> ValidationSet:
    field = f"validation.sets.{name}"
    if isinstance(folders, str):
        hr, lr, flags = folders, None, (f"{field}=", f"{field}.lr=")
    else:
        hr, lr, flags = folders.hr, folders.lr, (f"{field}.hr=", f"{field}.lr=")
    pairs, rejected = find_pairs(hr, lr, scale, flags)
    if rejected:
        first = rejected[0]
        print(f"note: {field}: {len(rejected)} files are not used; {first.path}: {first.reason}", flush=True)
    images = []
    for pair in pairs:
        pixels, _, sha256 = _read(pair, field, scale)
        height, width = pixels.shape[:2]
        try:
            metrics.require_size(height, width)
        except UserError as error:
            raise UserError(f"{field}: {pair.hr}: {error}; see validation.metrics") from None
        images.append(ImageFile(pair, field, scale, (height, width), sha256))
    return file_set(name, images)


def _read(pair: Pair, field: str, scale: int) -> tuple[Image, Image, str]:
    """HR, LR, and the digest of the pixels in the files. Raises UserError."""
    try:
        hr, lr = read_pair(pair, scale, border=scale)
    except PhotoRejected as error:
        raise UserError(f"{field}: {pair.hr}: {error}; remove or replace the file") from None
    # An LR image that is made from the HR image is not in the digest.
    return hr, lr, pixels_sha256(hr) + (pixels_sha256(lr) if pair.lr else "")
