"""The plan of an ingest: every image in order, listed without decoding any."""

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.config import DataConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.ingest.cutting import ImageJob, expected_bytes
from pipeline.data.ingest.decoding import PhotoRejected, open_image
from pipeline.data.ingest.download import DIV2K_HELD_OUT, DIV2K_TRAIN, download, missing_bytes
from pipeline.data.ingest.layout import (
    Folders,
    hr_folders,
    lr_candidates,
    lr_files,
    lr_next_to_hr,
    require_marked_hr,
    split_folders,
    split_parts,
)
from pipeline.data.ingest.sample_images import write_sample_photos
from pipeline.data.ingest.sources import PhotoFile, find_license, list_source
from pipeline.errors import UserError
from pipeline.storage import Storage, absolute, is_remote, join

_HEADER_BYTES = 65536
_HEADERS = 200
_DIV2K_PHOTOS, _DIV2K_SIZE = 800, (1404, 2040)
_DIV2K_LICENSE = "DIV2K (Agustsson and Timofte, 2017): for academic research only; https://data.vision.ee.ethz.ch/cvl/DIV2K/"


@dataclass(frozen=True)
class Plan:
    """All images of a data set."""

    jobs: list[ImageJob]
    licenses: dict[str, str | None]
    notes: tuple[str, ...] = ()
    """Files skipped for their folder or name, one line per source."""


def make_plan(config: DataConfig) -> Plan:
    """Lists every image, held-out ones first, so that an image in both sets is found early.

    Writes the images of `sample` and downloads the archives of `div2k` first.

    Raises:
        UserError: no images, LR files that cannot be paired, or LR files among the images.
    """
    if config.source is None:
        raise UserError("data.source: not set; give a folder of images, `sample` or `div2k`")
    source, held_out, license = config.source, config.held_out, config.license
    if source == "sample":
        source, default_held_out = _sample_folders(config)
        held_out = held_out or default_held_out
    elif source == "div2k":
        folder = download_folder(config)
        source, default_held_out = (
            str(download(archive, config.div2k_url, folder)) for archive in (DIV2K_TRAIN, DIV2K_HELD_OUT)
        )
        held_out, license = held_out or default_held_out, license or _DIV2K_LICENSE
    low = list_source(config.lr_dir, "data.lr_dir").photos if config.lr_dir is not None else []
    train, notes = _hr_files(source, "data.source", low, config)
    kept_out, more = _hr_files(held_out, "data.held_out", low, config) if held_out else ([], [])
    lows = pair_by_name(train + kept_out, low, config.scale) if low else {}
    everything = [(photo, True) for photo in kept_out] + [(photo, False) for photo in train]
    jobs = [
        ImageJob(index, photo, is_held_out, lows.get(photo.path))
        for index, (photo, is_held_out) in enumerate(everything)
    ]
    licenses = {"train": license or find_license(source)}
    if held_out:
        licenses["held_out"] = license or find_license(held_out)
    return Plan(jobs, licenses, (*notes, *more))


def _hr_files(
    source: str, field: str, low: list[PhotoFile], config: DataConfig
) -> tuple[list[PhotoFile], list[str]]:
    """The images of a source without LR files, and notes on what was skipped. Raises UserError."""
    source_listing = list_source(source, field)
    files = {photo.name: photo for photo in source_listing.photos}
    chosen, notes = list(files), []
    folders = split_folders(files, config.scale)
    if folders is not None:
        training, validation = split_parts(folders.hr)
        used, unused = (training, validation) if field == "data.source" else (validation, training)
        chosen = (used or folders.hr) + folders.rest
        lr = [*folders.lr, *folders.other_lr]
        if lr:
            notes.append(
                f"skipped as LR: {', '.join(sorted(lr))}" + _lr_advice(source, folders, used, config)
            )
        if folders.versions:
            notes.append(
                f"skipped as other versions of the same images: {', '.join(sorted(folders.versions))}"
            )
        if unused:
            kind = "validation" if field == "data.source" else "training"
            advice = " (data.held_out takes them)" if kind == "validation" and config.held_out is None else ""
            notes.append(f"skipped as {kind} images: {', '.join(hr_folders(unused))}{advice}")
        if notes:
            where = ", ".join(hr_folders(used or folders.hr))
            more = f" and {len(folders.rest)} files in other folders" if folders.rest else ""
            notes = [f"{field}={source}: HR images from {where}{more}; {'; '.join(notes)}"]
    if skipped := source_listing.skipped_note():
        notes.append(f"{field}={source}: not read: {skipped}")
    adjacent_lr = lr_next_to_hr(chosen)
    low_paths = {file.path for file in low}
    unknown = {name: hr for name, hr in adjacent_lr.items() if files[name].path not in low_paths}
    require_marked_hr(unknown, f"{field}={source}", "(data.lr_dir reads them)")
    if adjacent_lr:
        first = next(iter(adjacent_lr))
        notes.append(f"{field}={source}: skipped as LR: {len(adjacent_lr)} files such as {first}")
    return [files[name] for name in sorted(set(chosen) - adjacent_lr.keys())], notes


def pair_by_name(photos: list[PhotoFile], low: list[PhotoFile], scale: int) -> dict[str, PhotoFile]:
    """Low-resolution file of each image, by the image's path.

    The rule is `lr_candidates`: `0001.png` goes with `0001.png`, `0001x4.png`, `0001_LR.png` and the like, in a folder
    of the same relative name or, where that is clear, in any.

    Raises:
        UserError: two low-resolution files or two images with one name, or no pair at all.
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
        example = PurePosixPath(photos[0].name).stem.lower()
        raise UserError(
            f"data.lr_dir: no file is paired with an image by name; expected names like {example}x{scale}.png"
        )
    return pairs


def _lr_advice(source: str, folders: Folders, used: list[str], config: DataConfig) -> str:
    """How to train on the skipped LR files, if data.lr_dir is not set."""
    if config.lr_dir is not None:
        return ""
    fitting = folders.lr_folders_of(used or folders.hr)
    if len(fitting) == 1 and (is_remote(source) or Path(source).is_dir()):
        return f" (LR is computed by bicubic; set data.lr_dir={join(source, fitting[0])} to use these files)"
    return " (LR is computed by bicubic; set data.lr_dir to one of these to use its files)"


def plans_held_out(config: DataConfig) -> bool:
    """Whether the data set will have a held-out set once it is prepared."""
    return config.held_out is not None or config.source in ("sample", "div2k")


def needed_bytes(config: DataConfig) -> int:
    """Estimated size of patches and downloads. Raises UserError, as `make_plan` does."""
    if config.source == "sample":
        return 0
    if config.source == "div2k":
        # The archives count even if their folder is on another disk: an overestimate.
        folder = download_folder(config)
        archives = sum(missing_bytes(archive, folder) for archive in (DIV2K_TRAIN, DIV2K_HELD_OUT))
        return archives + _DIV2K_PHOTOS * expected_bytes(*_DIV2K_SIZE, config)
    jobs = [job for job in make_plan(config).jobs if not job.held_out]
    stride = max(1, len(jobs) // _HEADERS)
    total = 0
    for job in jobs[::stride]:
        # Only an estimate; ingest reports why a file is rejected.
        with suppress(PhotoRejected):
            image = open_image(job.photo.read(_HEADER_BYTES))
            total += expected_bytes(image.height, image.width, config)
    return total * stride


def download_folder(config: DataConfig) -> Path:
    """Folder of div2k's archives. Raises UserError: an object store without data.download_dir."""
    root = Storage(config.root)
    if config.download_dir is None and root.remote:
        raise UserError(
            f"data.root={config.root}: div2k's archives need a folder that all nodes share; set data.download_dir"
        )
    return Path(absolute(config.download_dir or root.path("photos")))


def is_div2k(manifest: Manifest) -> bool:
    """Whether a data set was made from DIV2K's training archive."""
    folder = Path(DIV2K_TRAIN.name).stem
    return all(
        PurePosixPath(entry["path"]).parts[0] == folder
        for entry in manifest.sources
        if entry["set"] == "train"
    )


def _sample_folders(config: DataConfig) -> tuple[str, str]:
    """Writes the sample images next to the data set (for an object store: into a temporary folder)."""
    root = Storage(config.root)
    folder = f"{tempfile.gettempdir()}/esrgan-ray-sample-photos" if root.remote else root.path("photos")
    write_sample_photos(folder)
    return f"{folder}/train", f"{folder}/held_out"
