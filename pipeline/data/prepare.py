"""Photographs in, a data set out: the plan, its checks, and the run of it."""

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from pipeline.data.build import NOTES, Builder
from pipeline.data.config import DataConfig
from pipeline.data.cutting import PhotoJob, cut_photos
from pipeline.data.geometry import check_geometry, expected_bytes
from pipeline.data.manifest import NAME, Manifest, load_manifest
from pipeline.data.pairs import pair_by_name, read_size
from pipeline.data.samples import write_sample_photos
from pipeline.data.sources import PhotoFile, find_licence, list_photos
from pipeline.errors import UserError
from pipeline.storage import Storage

# What decides the bytes of a data set, besides the photographs.
SETTINGS = (
    "scale",
    "edge",
    "patch_px",
    "patch_step_px",
    "codec",
    "shard_mib",
    "min_detail",
    "max_megapixels",
)
_HEADER_BYTES = 65536
_HEADERS = 200


@dataclass(frozen=True)
class PrepareResult:
    """What a data set holds."""

    patches: int
    sources: int
    """Photographs that gave patches or are held out."""
    rejected: int
    """Photographs that were refused; the manifest says why."""
    manifest_sha256: str


@dataclass(frozen=True)
class _Plan:
    jobs: list[PhotoJob]
    licences: dict[str, str | None]


def check_source(config: DataConfig) -> None:
    """Finds mistakes before anything is started: places, photographs, sizes, free space.

    Raises:
        UserError: one line that names the field.
    """
    check_geometry(config)
    if config.source is None:
        raise UserError(
            f"data.root={config.root}: there is no data set, and data.source does not say where photographs are; "
            "set data.source to a folder, or to `sample`"
        )
    storage = Storage(config.root)
    storage.require_writable("data.root")
    if config.source == "sample":
        return
    plan = _plan(config)
    free = storage.free_bytes()
    needed = _expected_bytes(plan.jobs, config)
    if free is not None and needed > free:
        raise UserError(
            f"data.root={config.root}: {free / 2**30:.1f} GiB free, and patches take about {needed / 2**30:.1f} GiB; "
            "choose another place, a larger data.patch_step_px or data.codec=webp"
        )


def prepare(
    config: DataConfig, *, strict: bool = False, progress: bool = True, on_ray: bool = True
) -> PrepareResult:
    """Makes the data set, or goes on where an earlier try was interrupted.

    The result is the same, byte for byte, whatever the number of CPUs and interruptions. A data set that is complete
    is left alone.

    Args:
        config: source, held-out photographs, root and geometry.
        strict: the first photograph that is refused is an error.
        progress: show photographs/s and the time left.
        on_ray: cut on Ray's workers (it must be connected), or in this process.

    Raises:
        UserError: nothing usable, too much refused, or a data set with other settings or photographs at the root.
    """
    check_geometry(config)
    storage = Storage(config.root)
    settings = {name: getattr(config, name) for name in SETTINGS}
    plan = _plan(config)
    if storage.exists(NAME):
        manifest = load_manifest(config.root)
        _require_same(manifest, settings, plan.jobs)
        storage.remove(NOTES)  # where an ingest was killed right after its last step
        print(f"{storage.path(NAME)}: complete, nothing to do", flush=True)
        return describe(manifest)

    builder = Builder(storage, plan.jobs, config, settings, strict)
    paired = config.lr_dir is not None
    left = plan.jobs[builder.first_index :]
    if builder.first_index:
        print(f"going on at photograph {builder.first_index + 1} of {len(plan.jobs)}", flush=True)
    with tqdm(
        total=len(plan.jobs), initial=builder.first_index, unit="photo", disable=not progress, file=sys.stdout,
        mininterval=1 if sys.stdout.isatty() else 10, desc="cutting",
    ) as bar:  # fmt: skip
        builder.consume(
            _tables(left, config, paired, on_ray), on_photo=lambda index: bar.update(index - bar.n)
        )
        bar.update(len(plan.jobs) - bar.n)
    libraries = {name: metadata.version(name) for name in ("numpy", "pillow", "pyarrow")}
    builder.finish(plan.licences, libraries)
    manifest = load_manifest(config.root)
    _warn_of_other_degradations(manifest)
    return describe(manifest)


def _tables(jobs: list[PhotoJob], config: DataConfig, paired: bool, on_ray: bool) -> Iterable[pa.Table]:
    if not on_ray:
        return cut_photos(jobs, config, paired)
    from pipeline.data.ingest import cut_on_ray

    return cut_on_ray(jobs, config, paired)


def _plan(config: DataConfig) -> _Plan:
    """Every photograph, held-out ones first: a picture in both sets is then found early."""
    if config.source is None:
        raise UserError("data.source: not set; give a folder of photographs, or `sample`")
    source, held_out = config.source, config.held_out
    if source == "sample":
        source, held_out = _sample_folders(config)
    train = list_photos(source)
    kept_out = list_photos(held_out, "data.held_out") if held_out else []
    lows: dict[str, PhotoFile] = {}
    if config.lr_dir is not None:
        lows = pair_by_name(train + kept_out, list_photos(config.lr_dir, "data.lr_dir"), config.scale)
    everything = [(photo, True) for photo in kept_out] + [(photo, False) for photo in train]
    jobs = [
        PhotoJob(index, photo, is_held_out, lows.get(photo.path))
        for index, (photo, is_held_out) in enumerate(everything)
    ]
    licences = {"train": config.licence or find_licence(source)}
    if held_out:
        licences["held_out"] = config.licence or find_licence(held_out)
    return _Plan(jobs, licences)


def _sample_folders(config: DataConfig) -> tuple[str, str]:
    """Writes the sample photographs beside the data set (for an object store: into a temporary folder)."""
    root = Storage(config.root)
    folder = f"{tempfile.gettempdir()}/esrgan-ray-sample-photos" if root.remote else root.path("photos")
    write_sample_photos(folder)
    return f"{folder}/train", f"{folder}/held_out"


def _expected_bytes(jobs: list[PhotoJob], config: DataConfig) -> int:
    """About how large the patches will be, from the headers of some photographs."""
    step = max(1, len(jobs) // _HEADERS)
    some = [job for job in jobs if not job.held_out][::step]
    total = 0
    for job in some:
        try:
            size = read_size(job.photo.read(_HEADER_BYTES))
        except Exception:  # noqa: BLE001 - only an estimate; ingest names what is wrong
            continue
        if size is not None:
            total += expected_bytes(*size, config)
    return total * step


def _require_same(manifest: Manifest, settings: dict[str, Any], jobs: list[PhotoJob]) -> None:
    different = [
        f"data.{name} was {manifest.settings.get(name)!r}, now {value!r}"
        for name, value in settings.items()
        if manifest.settings.get(name) != value
    ]
    if different:
        raise UserError(
            f"data.root={manifest.root} holds a data set with other settings ({'; '.join(different)}); "
            "choose another data.root, or remove it"
        )
    there = {(entry["set"] == "held_out", entry["path"]) for entry in manifest.sources}
    refused = {entry["path"] for entry in manifest.rejected}
    sizes = {(entry["set"] == "held_out", entry["path"]): entry["bytes"] for entry in manifest.sources}
    for job in jobs:
        key = (job.held_out, job.photo.name)
        changed = job.photo.size >= 0 and sizes.get(key, job.photo.size) != job.photo.size
        if (key not in there and job.photo.name not in refused) or changed:
            raise UserError(
                f"data.root={manifest.root} was made from other photographs ({job.photo.name} is new or changed); "
                "choose another data.root, or remove it"
            )
    if len(jobs) != len(there) + len(manifest.rejected):
        raise UserError(
            f"data.root={manifest.root} was made from more photographs than there are now; "
            "choose another data.root, or remove it"
        )


def _warn_of_other_degradations(manifest: Manifest) -> None:
    matches: dict[str, int] = manifest.degradation.get("matches", {})
    others = {name: count for name, count in matches.items() if name != "matlab_uint8"}
    if others:
        found = ", ".join(f"{count} x {name}" for name, count in sorted(others.items()))
        print(
            f"warning: data.lr_dir: low resolution was not made by MATLAB's bicubic on uint8 ({found} of "
            f"{sum(matches.values())}); evaluate.py makes its own that way unless --lr names files",
            flush=True,
        )


def describe(manifest: Manifest) -> PrepareResult:
    """The counts of a finished data set."""
    return PrepareResult(manifest.patches, len(manifest.sources), len(manifest.rejected), manifest.sha256)
