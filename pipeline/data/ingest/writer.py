"""Turns the ordered stream of cut photographs into shards, and remembers after each shard how far it came.

The stream has one order, so the same photographs give the same bytes whatever made the stream and however often it was
interrupted. Notes of progress lie in .ingest/ until the manifest is written.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Shard
from pipeline.data.format.row_checksums import pack_seal
from pipeline.data.format.shards import HELD_OUT_SCHEMA, PATCH_SCHEMA, ShardWriter
from pipeline.data.ingest.cutting import PhotoJob
from pipeline.errors import UserError
from pipeline.storage import Storage

NOTES = ".ingest"
_PLAN = f"{NOTES}/plan.json"
_MIB = 1 << 20
# What an ingest makes in its folder; anything else there is somebody's own.
_PARTIAL = re.compile(
    rf"\.({manifests.SHARD_NAME.pattern}|{re.escape(manifests.NAME)})\.[0-9a-f]{{8}}\.partial"
)


def plan_fingerprint(jobs: Iterable[PhotoJob], settings: dict[str, Any]) -> str:
    """sha256 over everything that decides the result, file times included."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for job in jobs:
        for file in (job.photo, job.low):
            if file is not None:
                digest.update(repr((job.held_out, file.name, file.size, file.modified_ns)).encode())
    return digest.hexdigest()


@dataclass
class _Progress:
    """What is finished: everything before row `rows` of photograph `index`."""

    index: int = 0
    rows: int = 0
    patches: int = 0
    shards: list[Shard] = field(default_factory=list)
    held_out: list[Shard] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


class Builder:
    """Writes a data set from tables in order; resumes where an earlier one stopped."""

    def __init__(
        self,
        storage: Storage,
        jobs: list[PhotoJob],
        config: DataConfig,
        settings: dict[str, Any],
        strict: bool,
    ) -> None:
        self._storage, self._jobs, self._config, self._settings = storage, jobs, config, settings
        self._strict = strict
        self._fingerprint = plan_fingerprint(jobs, settings)
        self._done = self._resume()
        self._next_patch = self._done.patches
        self._seen: dict[str, dict[str, Any]] = {
            entry["pixels_sha256"]: entry for entry in self._done.sources
        }
        self._writer: ShardWriter | None = None
        self._writer_held_out = False
        self._current = -1  # photograph in work
        self._skip = False  # its patches are dropped: refused after it was cut
        self._rows = 0  # its rows seen so far
        self._fresh_sources: list[dict[str, Any]] = []
        self._fresh_rejected: list[dict[str, Any]] = []

    @property
    def first_index(self) -> int:
        """The photograph to begin with."""
        return self._done.index

    @property
    def rejected(self) -> int:
        """Photographs refused so far."""
        return len(self._done.rejected) + len(self._fresh_rejected)

    def consume(
        self, tables: Iterable[pa.Table], on_photo: Callable[[int], None] = lambda index: None
    ) -> None:
        """Writes the shards. `on_photo` is called with the index of each photograph that begins."""
        try:
            for table in tables:
                for position in range(table.num_rows):
                    row = table.slice(position, 1)
                    index = row["index"][0].as_py()
                    text = row["info"][0].as_py()
                    if text is not None:
                        on_photo(index)
                        self._begin(index, json.loads(text))
                    elif not self._skip:
                        self._take(row)
            if self._writer is not None:
                self._close_shard()
        finally:
            if self._writer is not None:
                self._writer.abandon()

    def finish(self, licences: dict[str, str | None], libraries: dict[str, str]) -> None:
        """Writes the manifest, then removes the notes. Raises UserError: too much was refused."""
        rejected = self._done.rejected + self._fresh_rejected
        sources = self._done.sources + self._fresh_sources
        self._check_share(rejected)
        if not any(entry["set"] == "train" for entry in sources):
            first = f"; the first: {rejected[0]['path']}: {rejected[0]['reason']}" if rejected else ""
            raise UserError(
                f"data.source={self._config.source}: no usable photograph ({len(rejected)} refused{first})"
            )
        held_out = sum(job.held_out for job in self._jobs)
        if held_out and not any(entry["set"] == "held_out" for entry in sources):
            raise UserError(
                f"data.held_out={self._config.held_out}: none of {held_out} photographs is usable; "
                f"the first: {rejected[0]['path']}: {rejected[0]['reason']}"
            )
        if not self._next_patch:
            raise UserError(
                f"data.min_detail={self._config.min_detail}: every patch has a lower score; use a lower value"
            )
        matches: dict[str, int] = {}
        for entry in sources:
            if "degradation" in entry:
                matches[entry["degradation"]] = matches.get(entry["degradation"], 0) + 1
        content = {
            "patches": self._next_patch,
            "settings": self._settings,
            "degradation": {
                "kind": "files" if matches else "matlab_uint8",
                "edge": self._config.edge,
                **({"matches": matches} if matches else {}),
            },
            "sources": sources,
            "rejected": rejected,
            "shards": [asdict(shard) for shard in self._done.shards],
            "held_out": [asdict(shard) for shard in self._done.held_out],
            "licences": licences,
            "libraries": libraries,
        }
        self._storage.write_bytes(manifests.NAME, manifests.encode(content))
        self._storage.remove(NOTES)

    def _begin(self, index: int, info: dict[str, Any]) -> None:
        """A photograph begins: the one before is complete."""
        self._current, self._rows, self._skip = index, 0, False
        job = self._jobs[index]
        name = "held_out" if job.held_out else "train"
        path = job.photo.name
        reason = info.get("refused")
        twin = None if reason else self._seen.get(info["pixels_sha256"])
        if twin is not None and twin["set"] != name:
            raise UserError(
                f"data.source: {path} has the same pixels as {twin['path']} in the held-out set; remove one of them"
            )
        if twin is not None:
            reason = f"the same pixels as {twin['path']}"
        if reason is not None:
            self._skip = True
            self._fresh_rejected.append(
                {"path": path, "set": name, "reason": reason, "bytes": job.photo.size}
            )
            if self._strict:
                raise UserError(f"{path}: {reason} (--strict)")
            self._check_share(self._done.rejected + self._fresh_rejected)
            return
        entry = {
            "path": path,
            "set": name,
            "source_id": index,
            "first_patch": self._next_patch,
            "patches": 0,
            **info,
        }
        if index == self._done.index and self._done.rows:  # the rows in finished shards come first
            entry.update(first_patch=self._next_patch - self._done.rows, patches=self._done.rows)
        self._seen[info["pixels_sha256"]] = entry
        self._fresh_sources.append(entry)

    def _take(self, row: pa.Table) -> None:
        job = self._jobs[self._current]
        self._rows += 1
        if self._current == self._done.index and self._rows <= self._done.rows:
            return  # in a finished shard already
        if self._writer is not None and self._writer_held_out != job.held_out:
            self._close_shard()
            self._rows = 1
        if self._writer is None:
            self._writer_held_out = job.held_out
            name = "held_out" if job.held_out else "patches"
            number = len(self._done.held_out if job.held_out else self._done.shards)
            schema, codec = (HELD_OUT_SCHEMA, "raw") if job.held_out else (PATCH_SCHEMA, self._config.codec)
            self._writer = ShardWriter(self._storage, f"{name}-{number:05d}.parquet", schema, codec)
        self._writer.write(self._held_out_row(row) if job.held_out else self._patch_row(row))
        if not job.held_out:
            self._next_patch += 1
            self._fresh_sources[-1]["patches"] += 1
        if self._writer.bytes >= self._config.shard_mib * _MIB:
            self._close_shard()

    def _patch_row(self, row: pa.Table) -> pa.Table:
        body = np.frombuffer(row["checks"][0].as_buffer(), "<u8")
        columns = {
            "patch_id": pa.array([self._next_patch], pa.int64()),
            "source_id": pa.array([self._current], pa.int32()),
            "y": row["y"],
            "x": row["x"],
            "hr": row["hr"],
            "lr": row["lr"],
            "detail": row["detail"],
            "checks": pa.array([pack_seal(self._next_patch, body)], pa.binary()),
        }
        return pa.Table.from_arrays([columns[name] for name in PATCH_SCHEMA.names], schema=PATCH_SCHEMA)

    def _held_out_row(self, row: pa.Table) -> pa.Table:
        name = (
            self._jobs[self._current]
            .photo.name.encode("utf-8", "surrogateescape")
            .decode("utf-8", "backslashreplace")
        )
        columns = [
            pa.array([name]),
            row["y"],
            row["x"],
            row["hr"],
            row["lr"],
        ]
        return pa.Table.from_arrays(columns, schema=HELD_OUT_SCHEMA)

    def _close_shard(self) -> None:
        assert self._writer is not None
        shard = self._writer.finish()
        self._writer = None
        done = self._done
        (done.held_out if self._writer_held_out else done.shards).append(shard)
        done.patches = self._next_patch
        # The photograph in work stays out of the finished ones: it is announced again after an interruption. When the
        # set changes, it has no row in the finished shard yet.
        begun = self._fresh_sources.pop() if self._fresh_sources else None
        if begun is not None and begun["source_id"] != self._current:
            self._fresh_sources.append(begun)
            begun = None
        switched = self._jobs[self._current].held_out != self._writer_held_out
        done.index, done.rows = self._current, 0 if switched else self._rows
        done.sources += self._fresh_sources
        refused_now = self._skip and self._fresh_rejected
        last_refusal = [self._fresh_rejected.pop()] if refused_now else []
        done.rejected += self._fresh_rejected
        note = {
            "shard": asdict(shard),
            "held_out": self._writer_held_out,
            "index": done.index,
            "rows": done.rows,
            "patches": done.patches,
            "sources": self._fresh_sources,
            "rejected": self._fresh_rejected,
        }
        number = len(done.shards) + len(done.held_out) - 1
        self._storage.write_bytes(f"{NOTES}/{number:05d}.json", json.dumps(note).encode())
        self._fresh_sources = [begun] if begun is not None else []
        self._fresh_rejected = last_refusal

    def _resume(self) -> _Progress:
        """Progress of an earlier ingest of the same plan; otherwise clears what is left of another one."""
        done = _Progress()
        for name in self._storage.names():
            if _PARTIAL.fullmatch(name):  # of a process that was killed
                self._storage.remove(name)
        plan: dict[str, Any] | None
        try:
            plan = json.loads(self._storage.read_bytes(_PLAN))
        except (FileNotFoundError, ValueError):
            plan = None
        if plan is None or plan.get("fingerprint") != self._fingerprint:
            self._storage.remove(NOTES)
            for name in self._storage.names():
                if manifests.SHARD_NAME.fullmatch(name):
                    self._storage.remove(name)
            self._storage.write_bytes(_PLAN, json.dumps({"fingerprint": self._fingerprint}).encode())
            return done
        while True:
            number = len(done.shards) + len(done.held_out)
            try:
                note = json.loads(self._storage.read_bytes(f"{NOTES}/{number:05d}.json"))
                shard = Shard(**note["shard"])
                if self._storage.size(shard.name) != shard.bytes:
                    return done
            except (FileNotFoundError, TypeError, ValueError):
                return done
            (done.held_out if note["held_out"] else done.shards).append(shard)
            done.index, done.rows, done.patches = note["index"], note["rows"], note["patches"]
            done.sources += note["sources"]
            done.rejected += note["rejected"]

    def _check_share(self, rejected: list[dict[str, Any]]) -> None:
        limit = self._config.max_rejected_share * len(self._jobs)
        if len(rejected) > limit:
            last = rejected[-1]
            raise UserError(
                f"{len(rejected)} of {len(self._jobs)} photographs were refused, more than data.max_rejected_share="
                f"{self._config.max_rejected_share:g}; the last: {last['path']}: {last['reason']}"
            )
