"""Photographs in, a data set out: the plan, its checks, and the run of it."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from pipeline.data.config import DataConfig
from pipeline.data.format.manifest import NAME, Manifest, load_manifest
from pipeline.data.ingest.cutting import PhotoJob, cut_photos
from pipeline.data.ingest.geometry import check_geometry
from pipeline.data.ingest.plan import Plan, download_folder, is_div2k, make_plan, needed_bytes
from pipeline.data.ingest.writer import NOTES, Builder
from pipeline.errors import UserError
from pipeline.storage import LOCK, Storage, only_writer

# What decides the bytes of a data set, besides the photographs.
SETTINGS = (
    "scale",
    "edge",
    "patch_px",
    "patch_stride_px",
    "codec",
    "shard_mib",
    "min_detail",
    "max_megapixels",
)


@dataclass(frozen=True)
class PrepareResult:
    """What a data set holds."""

    patches: int
    sources: int
    """Photographs that gave patches or are held out."""
    rejected: int
    """Photographs that were refused; the manifest says why."""
    manifest_sha256: str


def check_source(config: DataConfig, prepare_command: str | None = None) -> None:
    """Finds mistakes before anything is started: places, photographs, sizes, free space.

    Args:
        config: the data section; there is no data set at its root.
        prepare_command: the command that prepares it, where that is left to the user to confirm.

    Raises:
        UserError: one line that names the field.
    """
    if prepare_command is not None:
        raise UserError(
            f"data.root={config.root}: there is no data set there; check the path, or prepare one first: "
            f"{prepare_command}"
        )
    check_geometry(config)
    if config.source is None:
        raise UserError(
            f"data.root={config.root}: there is no data set, and data.source does not say where photographs are; "
            "set data.source to a folder, or to `sample`"
        )
    storage = Storage(config.root)
    storage.require_writable("data.root")
    if config.source == "div2k":
        Storage(str(download_folder(config))).require_writable("data.download_dir")
    free, needed = storage.free_bytes(), needed_bytes(config)
    if free is not None and needed > free:
        raise UserError(
            f"data.root={config.root}: {free / 2**30:.1f} GiB free, and patches take about {needed / 2**30:.1f} GiB; "
            "choose another place, a larger data.patch_stride_px or data.codec=webp"
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
    if storage.exists(NAME):
        return _found(config, strict, progress)
    plan = make_plan(config, progress)
    refusal = (
        f"data.root={config.root}: another process is preparing this data set; wait for it or stop it first"
    )
    with only_writer(storage, refusal):
        if storage.exists(NAME):  # by now
            return _found(config, strict, progress)
        for note in plan.notes:
            print(f"note: {note}", flush=True)
        _make(plan, config, strict, progress, on_ray)
        storage.remove(LOCK)
    manifest = load_manifest(config.root)
    _warn_of_other_degradations(manifest)
    return describe(manifest)


def _found(config: DataConfig, strict: bool, progress: bool) -> PrepareResult:
    """What is there, if it is what is asked for. Raises UserError."""
    storage, manifest = Storage(config.root), load_manifest(config.root)
    _require_same_settings(manifest, _settings(config), config.lr_dir)
    # Its archives may be gone by now, and nobody wants to fetch them again for this.
    if config.source != "div2k" or not is_div2k(manifest):
        _require_same_photographs(manifest, make_plan(config, progress).jobs)
    _require_few_rejected(manifest, config, strict)
    for name in (NOTES, LOCK):  # where an ingest was killed right after its last step
        if storage.exists(name):
            storage.remove(name)
    print(f"{storage.path(NAME)}: complete, nothing to do", flush=True)
    return describe(manifest)


def _make(plan: Plan, config: DataConfig, strict: bool, progress: bool, on_ray: bool) -> None:
    builder = Builder(Storage(config.root), plan.jobs, config, _settings(config), strict)
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


def _settings(config: DataConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS}


def _tables(jobs: list[PhotoJob], config: DataConfig, paired: bool, on_ray: bool) -> Iterable[pa.Table]:
    if not on_ray:
        return cut_photos(jobs, config, paired)
    from pipeline.data.ingest.ray_ingest import cut_on_ray

    return cut_on_ray(jobs, config, paired)


def _require_same_settings(manifest: Manifest, settings: dict[str, Any], lr_dir: str | None) -> None:
    different = [
        f"data.{name} was {manifest.settings.get(name)!r}, now {value!r}"
        for name, value in settings.items()
        if manifest.settings.get(name) != value
    ]
    if (manifest.degradation["kind"] == "files") != (lr_dir is not None):
        different.append(
            f"its low resolution was {manifest.degradation['kind']}, now data.lr_dir is {lr_dir}"
        )
    if different:
        raise UserError(
            f"data.root={manifest.root} holds a data set with other settings ({'; '.join(different)}); "
            "choose another data.root, or remove it"
        )


def _require_same_photographs(manifest: Manifest, jobs: list[PhotoJob]) -> None:
    noted = [*manifest.sources, *(entry for entry in manifest.rejected if "set" in entry)]
    sizes = {(entry["set"] == "held_out", entry["path"]): entry["bytes"] for entry in noted}
    # Older data sets know only the names of what was refused.
    refused = {entry["path"] for entry in manifest.rejected if "set" not in entry}
    for job in jobs:
        size = sizes.get((job.held_out, job.photo.name))
        new = size is None and job.photo.name not in refused
        if new or (size is not None and min(size, job.photo.size) >= 0 and size != job.photo.size):
            raise UserError(
                f"data.root={manifest.root} was made from other photographs ({job.photo.name} is new or changed); "
                "choose another data.root, or remove it"
            )
    if len(jobs) != len(manifest.sources) + len(manifest.rejected):
        raise UserError(
            f"data.root={manifest.root} was made from more photographs than there are now; "
            "choose another data.root, or remove it"
        )


def _require_few_rejected(manifest: Manifest, config: DataConfig, strict: bool) -> None:
    """A data set that is there is held to the same limits as one that is made now. Raises UserError."""
    if strict and manifest.rejected:
        first = manifest.rejected[0]
        raise UserError(
            f"data.root={manifest.root}: made without {first['path']}: {first['reason']} (--strict)"
        )
    rejected, photographs = len(manifest.rejected), len(manifest.rejected) + len(manifest.sources)
    if rejected > config.max_rejected_share * photographs:
        raise UserError(
            f"data.root={manifest.root}: made without {rejected} of {photographs} photographs, more than "
            f"data.max_rejected_share={config.max_rejected_share:g}; prepare_data.py names them"
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
