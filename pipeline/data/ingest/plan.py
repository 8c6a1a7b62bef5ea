"""What an ingest will read: every photograph in its order, found without decoding any."""

import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.config import DataConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.ingest.cutting import PhotoJob
from pipeline.data.ingest.download import DIV2K_HELD_OUT, DIV2K_TRAIN, download, missing_bytes
from pipeline.data.ingest.geometry import expected_bytes
from pipeline.data.ingest.layout import (
    Folders,
    hr_folders,
    is_marked_hr,
    lr_beside_hr,
    split_folders,
    split_parts,
)
from pipeline.data.ingest.pairs import pair_by_name, read_size
from pipeline.data.ingest.sample_images import write_sample_photos
from pipeline.data.ingest.sources import PhotoFile, find_licence, list_photos
from pipeline.errors import UserError
from pipeline.storage import Storage, absolute, is_remote, join

_HEADER_BYTES = 65536
_HEADERS = 200
_DIV2K_PHOTOS, _DIV2K_SIZE = 800, (1404, 2040)
_DIV2K_LICENCE = "DIV2K (Agustsson and Timofte, 2017): for academic research only; https://data.vision.ee.ethz.ch/cvl/DIV2K/"


@dataclass(frozen=True)
class Plan:
    """All photographs of a data set."""

    jobs: list[PhotoJob]
    licences: dict[str, str | None]
    notes: tuple[str, ...] = ()
    """What was skipped for its place or name, a line for each source."""


def make_plan(config: DataConfig, progress: bool = True) -> Plan:
    """Lists every photograph, held-out ones first: a picture in both sets is then found early.

    `sample` writes its photographs first, and `div2k` downloads its archives.

    Raises:
        UserError: nothing there, LR files that do not belong to the images, or LR files among the images.
    """
    if config.source is None:
        raise UserError("data.source: not set; give a folder of photographs, `sample` or `div2k`")
    source, held_out, licence = config.source, config.held_out, config.license
    if source == "sample":
        source, own = _sample_folders(config)
        held_out = held_out or own
    elif source == "div2k":
        folder = download_folder(config)
        source, own = (
            str(download(archive, config.div2k_url, folder, progress=progress))
            for archive in (DIV2K_TRAIN, DIV2K_HELD_OUT)
        )
        held_out, licence = held_out or own, licence or _DIV2K_LICENCE
    low = list_photos(config.lr_dir, "data.lr_dir") if config.lr_dir is not None else []
    train, notes = _hr_files(source, "data.source", low, config)
    kept_out, more = _hr_files(held_out, "data.held_out", low, config) if held_out else ([], [])
    lows = pair_by_name(train + kept_out, low, config.scale) if low else {}
    everything = [(photo, True) for photo in kept_out] + [(photo, False) for photo in train]
    jobs = [
        PhotoJob(index, photo, is_held_out, lows.get(photo.path))
        for index, (photo, is_held_out) in enumerate(everything)
    ]
    licences = {"train": licence or find_licence(source)}
    if held_out:
        licences["held_out"] = licence or find_licence(held_out)
    return Plan(jobs, licences, (*notes, *more))


def _hr_files(
    source: str, field: str, low: list[PhotoFile], config: DataConfig
) -> tuple[list[PhotoFile], list[str]]:
    """The images of a source without the LR files among them, and what was skipped. Raises UserError."""
    files = {photo.name: photo for photo in list_photos(source, field)}
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
    beside = lr_beside_hr(chosen)
    low_paths = {file.path for file in low}
    unmarked = [
        name for name, hr in beside.items() if not is_marked_hr(hr) and files[name].path not in low_paths
    ]
    if unmarked:
        raise UserError(
            f"{field}={source}: {unmarked[0]} is next to {beside[unmarked[0]]} and by its name the same image at "
            f"another size ({len(unmarked)} such files); move LR files to a folder of their own (data.lr_dir reads "
            "them), or rename them"
        )
    if beside:
        first = next(iter(beside))
        notes.append(f"{field}={source}: skipped as LR: {len(beside)} files such as {first}")
    return [files[name] for name in sorted(set(chosen) - beside.keys())], notes


def _lr_advice(source: str, folders: Folders, used: list[str], config: DataConfig) -> str:
    """How to train on the LR files that are skipped, where data.lr_dir is not set."""
    if config.lr_dir is not None:
        return ""
    fitting = folders.lr_folders_of(used or folders.hr)
    if len(fitting) == 1 and (is_remote(source) or Path(source).is_dir()):
        return f" (LR is made by bicubic; set data.lr_dir={join(source, fitting[0])} to use these files)"
    return " (LR is made by bicubic; set data.lr_dir to one of these to use its files)"


def plans_held_out(config: DataConfig) -> bool:
    """Whether the data set will have a held-out set once it is prepared."""
    return config.held_out is not None or config.source in ("sample", "div2k")


def needed_bytes(config: DataConfig) -> int:
    """About how much space patches and downloads will take. Raises UserError, as `make_plan` does."""
    if config.source == "sample":
        return 0
    if config.source == "div2k":
        # The archives count even where their folder is on another disk: a little too much.
        folder = download_folder(config)
        archives = sum(missing_bytes(archive, folder) for archive in (DIV2K_TRAIN, DIV2K_HELD_OUT))
        return archives + _DIV2K_PHOTOS * expected_bytes(*_DIV2K_SIZE, config)
    jobs = [job for job in make_plan(config).jobs if not job.held_out]
    step = max(1, len(jobs) // _HEADERS)
    total = 0
    for job in jobs[::step]:
        try:
            size = read_size(job.photo.read(_HEADER_BYTES))
        except Exception:  # noqa: BLE001 - only an estimate; ingest names what is wrong
            continue
        if size is not None:
            total += expected_bytes(*size, config)
    return total * step


def download_folder(config: DataConfig) -> Path:
    """Where div2k's archives go. Raises UserError: an object store, and no folder is named."""
    root = Storage(config.root)
    if config.download_dir is None and root.remote:
        raise UserError(
            f"data.root={config.root}: div2k's archives need a folder that every node sees; set data.download_dir"
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
    """Writes the sample photographs beside the data set (for an object store: into a temporary folder)."""
    root = Storage(config.root)
    folder = f"{tempfile.gettempdir()}/esrgan-ray-sample-photos" if root.remote else root.path("photos")
    write_sample_photos(folder)
    return f"{folder}/train", f"{folder}/held_out"
