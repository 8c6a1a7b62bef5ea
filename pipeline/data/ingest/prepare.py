"""Prepares a data set: preflight checks, plan, ingest, manifest."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pipeline.data.config import DataConfig
from pipeline.data.format.manifest import NAME, Manifest, load_manifest
from pipeline.data.ingest.cutting import CutImage, ImageJob, Rejection, check_geometry, cut_image
from pipeline.data.ingest.plan import Plan, download_folder, is_div2k, make_plan, needed_bytes
from pipeline.data.ingest.writer import PROGRESS_FOLDER, DataSetWriter, require_few_rejected
from pipeline.errors import UserError
from pipeline.progress import progress_bar
from pipeline.storage import LOCK, Storage, only_writer

# The fields that determine the bytes of a data set, with the images.
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
    """Counts of a complete data set."""

    patches: int
    sources: int
    """Images with patches, or held out."""
    rejected: int
    """Rejected images; the manifest has the reasons."""
    manifest_sha256: str


def check_source(config: DataConfig, prepare_command: str | None = None) -> None:
    """Preflight checks: source, images, sizes, free space.

    Args:
        config: the data section; no data set exists at its root.
        prepare_command: the command that prepares it, if the user must run it.

    Raises:
        UserError: one line that names the field.
    """
    if prepare_command is not None:
        raise UserError(
            f"data.root={config.root}: no data set; check the path, or prepare one first: {prepare_command}"
        )
    check_geometry(config)
    if config.source is None:
        raise UserError(
            f"data.root={config.root}: no data set, and data.source is not set; "
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
            "choose another data.root, a larger data.patch_stride_px or data.codec=webp"
        )


def prepare(config: DataConfig, *, strict: bool = False, on_ray: bool = True) -> PrepareResult:
    """Prepares the data set, or resumes an interrupted attempt.

    The result is identical in every byte for any number of CPUs and interruptions. A complete data set is not modified.

    Args:
        config: source, held-out images, root and geometry.
        strict: any rejected image is an error.
        on_ray: cut in tasks of the connected Ray cluster, or in this process.

    Raises:
        UserError: no usable image, too many rejected, or a data set with other settings or images at the root.
    """
    check_geometry(config)
    storage = Storage(config.root)
    if storage.exists(NAME):
        return _existing(config, strict)
    plan = make_plan(config)
    locked = (
        f"data.root={config.root}: another process is preparing this data set; wait for it or stop it first"
    )
    with only_writer(storage, locked):
        if storage.exists(NAME):  # written while waiting for the lock
            return _existing(config, strict)
        for note in plan.notes:
            print(f"note: {note}", flush=True)
        _make(plan, config, strict, on_ray)
        storage.remove(LOCK)
    manifest = load_manifest(config.root)
    _warn_of_other_degradations(manifest)
    return describe(manifest)


def _existing(config: DataConfig, strict: bool) -> PrepareResult:
    """The complete data set at the root, if it is the configured one. Raises UserError."""
    storage, manifest = Storage(config.root), load_manifest(config.root)
    _require_same_settings(manifest, _settings(config), config.lr_dir)
    # The archives may have been deleted; do not download them again just for this check.
    if config.source != "div2k" or not is_div2k(manifest):
        _require_same_images(manifest, make_plan(config).jobs)
    images = len(manifest.rejected) + len(manifest.sources)
    where = f"data.root={config.root}: "
    require_few_rejected(manifest.rejected, images, config, strict, where)
    for name in (PROGRESS_FOLDER, LOCK):  # if an ingest was killed just after writing the manifest
        if storage.exists(name):
            storage.remove(name)
    print(f"{storage.path(NAME)}: complete, nothing to do", flush=True)
    return describe(manifest)


def _make(plan: Plan, config: DataConfig, strict: bool, on_ray: bool) -> None:
    writer = DataSetWriter(Storage(config.root), plan.jobs, config, _settings(config), strict)
    total, done = len(plan.jobs), writer.images
    remaining = plan.jobs[done:]
    if done:
        print(f"resuming at image {done + 1} of {total}", flush=True)
    paired = config.lr_dir is not None
    images: Iterable[CutImage | Rejection] = (cut_image(job, config, paired) for job in remaining)
    if on_ray:
        from pipeline.data.ingest.ray_ingest import cut_on_ray

        images = cut_on_ray(remaining, config, paired)
    writer.write(progress_bar(images, total=total, initial=done, unit=" images", desc="cutting"))
    libraries = {name: metadata.version(name) for name in ("numpy", "pillow", "pyarrow")}
    writer.finish(plan.licenses, libraries)


def _settings(config: DataConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS}


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
            f"data.root={manifest.root} contains a data set with other settings ({'; '.join(different)}); "
            "choose another data.root, or remove it"
        )


def _require_same_images(manifest: Manifest, jobs: list[ImageJob]) -> None:
    entries = [*manifest.sources, *manifest.rejected]
    sizes = {(entry["set"] == "held_out", entry["path"]): entry["bytes"] for entry in entries}
    for job in jobs:
        size = sizes.get((job.held_out, job.photo.name))
        if size is None or (min(size, job.photo.size) >= 0 and size != job.photo.size):
            raise UserError(
                f"data.root={manifest.root} was made from other images ({job.photo.name} is new or changed); "
                "choose another data.root, or remove it"
            )
    if len(jobs) != len(entries):
        raise UserError(
            f"data.root={manifest.root} was made from more images than the source contains now; "
            "choose another data.root, or remove it"
        )


def _warn_of_other_degradations(manifest: Manifest) -> None:
    matches: dict[str, int] = manifest.degradation.get("matches", {})
    others = {name: count for name, count in matches.items() if name != "matlab_uint8"}
    if others:
        counts = ", ".join(f"{count} x {name}" for name, count in sorted(others.items()))
        print(
            f"warning: data.lr_dir: low resolution was not made by MATLAB's bicubic on uint8 ({counts} of "
            f"{sum(matches.values())}); evaluate.py downscales that way unless --lr is given",
            flush=True,
        )


def describe(manifest: Manifest) -> PrepareResult:
    """The counts of a complete data set."""
    return PrepareResult(manifest.patches, len(manifest.sources), len(manifest.rejected), manifest.sha256)
