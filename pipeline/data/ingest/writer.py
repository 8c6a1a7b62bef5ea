"""Writes cut images to shards and the manifest; an interrupted ingest resumes after its last complete shard.

Images are written in one order, and a shard is closed between images. So the same images give the same bytes, on Ray or
in one process, however often the ingest was interrupted. The progress is in .ingest/ until the manifest is written.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Shard
from pipeline.data.format.row_checksums import pack
from pipeline.data.format.shards import HELD_OUT_SCHEMA, PATCH_SCHEMA, ShardWriter
from pipeline.data.ingest.cutting import CutImage, ImageJob, Rejection, cut
from pipeline.errors import UserError
from pipeline.storage import Storage

PROGRESS_FOLDER = ".ingest"
_PROGRESS = f"{PROGRESS_FOLDER}/progress.json"
_MIB = 1 << 20
# Partial files of ingest; everything else in the folder is left untouched.
_PARTIAL = re.compile(
    rf"\.({manifests.SHARD_NAME.pattern}|{re.escape(manifests.NAME)})\.[0-9a-f]{{8}}\.partial"
)


def plan_fingerprint(jobs: Iterable[ImageJob], settings: dict[str, Any]) -> str:
    """sha256 over everything that determines the result, file times included."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for job in jobs:
        for file in (job.photo, job.low):
            if file is not None:
                digest.update(repr((job.held_out, file.name, file.size, file.modified_ns)).encode())
    return digest.hexdigest()


@dataclass
class _Progress:
    """What images 0..images - 1 gave."""

    fingerprint: str
    """Of the plan."""
    images: int = 0
    patches: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    held_out: list[Shard] = field(default_factory=list)


class DataSetWriter:
    """Writes a data set from cut images in the order of `jobs`."""

    def __init__(
        self,
        storage: Storage,
        jobs: list[ImageJob],
        config: DataConfig,
        settings: dict[str, Any],
        strict: bool,
    ) -> None:
        self._storage, self._jobs, self._config, self._settings = storage, jobs, config, settings
        self._strict = strict
        self._done = self._resumed(plan_fingerprint(jobs, settings))
        self._by_pixels = {entry["pixels_sha256"]: entry for entry in self._done.sources}
        self._writer: ShardWriter | None = None

    @property
    def images(self) -> int:
        """Images in complete shards; writing starts with the next one."""
        return self._done.images

    def write(self, images: Iterable[CutImage | Rejection]) -> None:
        """Writes the shards of all remaining images.

        Raises:
            UserError: an image is in both sets, too many are rejected, or any is and `strict` is set.
        """
        self._check_rejections()
        try:
            for job, image in zip(self._jobs[self.images :], images, strict=True):
                self._add(job, image)
                self._done.images += 1
                following = self._jobs[job.index + 1 : job.index + 2]
                last_of_set = not following or following[0].held_out != job.held_out
                writer = self._writer
                if writer is not None and (last_of_set or writer.bytes >= self._config.shard_mib * _MIB):
                    # All images so far are complete: the shard is published, then the progress is saved.
                    (self._done.held_out if job.held_out else self._done.shards).append(writer.finish())
                    self._writer = None
                    self._save(self._done)
        finally:
            if self._writer is not None:
                self._writer.abandon()

    def finish(self, licenses: dict[str, str | None], libraries: dict[str, str]) -> None:
        """Writes the manifest, then removes the progress. Raises UserError: a set is empty."""
        done = self._done
        if not any(entry["set"] == "train" for entry in done.sources):
            first = f"; the first: {_named(done.rejected[0])}" if done.rejected else ""
            raise UserError(
                f"data.source={self._config.source}: no usable image ({len(done.rejected)} rejected{first})"
            )
        held_out = sum(job.held_out for job in self._jobs)
        if held_out and not any(entry["set"] == "held_out" for entry in done.sources):
            raise UserError(
                f"data.held_out={self._config.held_out}: none of {held_out} images is usable; "
                f"the first: {_named(done.rejected[0])}"
            )
        if not done.patches:
            raise UserError(
                f"data.min_detail={self._config.min_detail}: every patch has a lower score; use a lower value"
            )
        matches = Counter(entry["degradation"] for entry in done.sources if "degradation" in entry)
        content = {
            "patches": done.patches,
            "settings": self._settings,
            "degradation": {
                "kind": "files" if matches else "matlab_uint8",
                "edge": self._config.edge,
                **({"matches": matches} if matches else {}),
            },
            "sources": done.sources,
            "rejected": done.rejected,
            "shards": [asdict(shard) for shard in done.shards],
            "held_out": [asdict(shard) for shard in done.held_out],
            "licenses": licenses,
            "libraries": libraries,
        }
        self._storage.write_bytes(manifests.NAME, manifests.encode(content))
        self._storage.remove(PROGRESS_FOLDER)

    def _add(self, job: ImageJob, image: CutImage | Rejection) -> None:
        name = "held_out" if job.held_out else "train"
        reason = image.reason if isinstance(image, Rejection) else self._duplicate(job, name, image.facts)
        if isinstance(image, Rejection) or reason is not None:
            path = job.photo.name
            self._done.rejected.append({"path": path, "set": name, "reason": reason, "bytes": job.photo.size})
            self._check_rejections()
            return
        first_patch = self._done.patches
        for table in image.tables:
            if self._writer is None:
                self._writer = self._open_shard(job.held_out)
            if job.held_out:
                self._writer.write(self._held_out_row(job, image.facts, table))
            else:
                self._writer.write(self._patch_rows(job, table))
                self._done.patches += table.num_rows
        entry = {
            "path": job.photo.name,
            "set": name,
            "source_id": job.index,
            "first_patch": first_patch,
            "patches": self._done.patches - first_patch,
            **image.facts,
        }
        self._by_pixels[entry["pixels_sha256"]] = entry
        self._done.sources.append(entry)

    def _duplicate(self, job: ImageJob, name: str, facts: dict[str, Any]) -> str | None:
        """Why an image is rejected as a duplicate. Raises UserError: the other one is in the other set."""
        other = self._by_pixels.get(facts["pixels_sha256"])
        if other is None:
            return None
        if other["set"] != name:
            raise UserError(
                f"data.source: {job.photo.name} has the same pixels as {other['path']} in the held-out set; "
                "remove one of them"
            )
        return f"the same pixels as {other['path']}"

    def _patch_rows(self, job: ImageJob, table: pa.Table) -> pa.Table:
        ids = range(self._done.patches, self._done.patches + table.num_rows)
        sums = [np.frombuffer(cell.as_buffer(), "<u8") for cell in table["row_checksums"]]
        columns = {name: table[name] for name in table.column_names} | {
            "patch_id": pa.array(ids, pa.int64()),
            "source_id": pa.array([job.index] * table.num_rows, pa.int32()),
            "row_checksums": pa.array([pack(*pair) for pair in zip(ids, sums, strict=True)], pa.binary()),
        }
        return pa.Table.from_arrays([columns[name] for name in PATCH_SCHEMA.names], schema=PATCH_SCHEMA)

    def _held_out_row(self, job: ImageJob, facts: dict[str, Any], table: pa.Table) -> pa.Table:
        # Parquet strings are UTF-8; file names need not be.
        name = job.photo.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        height, width = (cut(facts[side], self._config.scale) for side in ("height", "width"))
        columns = [pa.array([name]), pa.array([height], pa.int32()), pa.array([width], pa.int32())]
        return pa.Table.from_arrays([*columns, table["hr"], table["lr"]], schema=HELD_OUT_SCHEMA)

    def _open_shard(self, held_out: bool) -> ShardWriter:
        done = self._done
        kind, number = ("held_out", len(done.held_out)) if held_out else ("patches", len(done.shards))
        return ShardWriter(
            self._storage, f"{kind}-{number:05d}.parquet", HELD_OUT_SCHEMA if held_out else PATCH_SCHEMA
        )

    def _save(self, progress: _Progress) -> None:
        self._storage.write_bytes(_PROGRESS, json.dumps(asdict(progress)).encode())

    def _resumed(self, fingerprint: str) -> _Progress:
        """The progress of an earlier ingest of the same plan; without one, the files of another plan are removed."""
        names = self._storage.names()
        for name in names:
            if _PARTIAL.fullmatch(name):  # of a killed process
                self._storage.remove(name)
        try:
            saved = json.loads(self._storage.read_bytes(_PROGRESS))
            for kind in ("shards", "held_out"):
                saved[kind] = [Shard(**entry) for entry in saved[kind]]
            done = _Progress(**saved)
            complete = all(
                self._storage.size(shard.name) == shard.bytes for shard in (*done.shards, *done.held_out)
            )
            if complete and done.fingerprint == fingerprint:
                return done
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            pass
        for name in names:
            if manifests.SHARD_NAME.fullmatch(name):
                self._storage.remove(name)
        done = _Progress(fingerprint)
        self._save(done)
        return done

    def _check_rejections(self) -> None:
        require_few_rejected(self._done.rejected, len(self._jobs), self._config, self._strict)


def require_few_rejected(
    rejected: Sequence[dict[str, Any]], images: int, config: DataConfig, strict: bool, where: str = ""
) -> None:
    """Raises UserError, with `where`: too many of `images` were rejected, or any and `strict` is set."""
    if strict and rejected:
        raise UserError(f"{where}{_named(rejected[0])} (--strict)")
    if len(rejected) > config.max_rejected_share * images:
        raise UserError(
            f"{where}{len(rejected)} of {images} images were rejected, more than data.max_rejected_share="
            f"{config.max_rejected_share:g}; the last: {_named(rejected[-1])}"
        )


def _named(entry: dict[str, Any]) -> str:
    return f"{entry['path']}: {entry['reason']}"
