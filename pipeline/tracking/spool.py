"""Tracking records, and the files in the run's folder in which they are stored until they are sent.

The loop writes one segment right before each checkpoint is published:

    tracking/00000200.jsonl     a header, then one record per line
    tracking/00000200/0000.png  the segment's images

A segment is sent once a checkpoint of its step, or of a later one, is published. What a run did between its last
checkpoint and a crash is therefore never sent, and the curves have every point once.
"""

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.imaging.arrays import decoded, encoded
from pipeline.storage import Storage

FOLDER = "tracking"
FORMAT = 1
VALIDATION = "validation/"
_NAME = re.compile(r"^(\d{8,})\.jsonl$")
_CHECKPOINT = re.compile(r"^[a-z]+-(\d{8,})$")


@dataclass(frozen=True)
class Metrics:
    """Named values at a global step, at a time in milliseconds since 1970."""

    step: int
    time_ms: int
    values: dict[str, float]


@dataclass(frozen=True)
class ImageRecord:
    """An image under `key` at a global step; (H, W, 3) uint8 RGB. MLflow shows one key over the steps as a slider."""

    step: int
    time_ms: int
    key: str
    image: np.ndarray


@dataclass(frozen=True)
class Event:
    """A line of text about something that happened once: a restart, a change of the number of workers."""

    step: int
    time_ms: int
    text: str


Record = Metrics | ImageRecord | Event


@dataclass(frozen=True)
class Segment:
    """A segment as it was written."""

    step: int
    after: int
    """Step of the previous segment at the time of writing; -1 for the first."""
    records: list[Record]


class CorruptSegment(Exception):
    """A segment that cannot be read; the message contains its path."""


def write_segment(run: Storage, step: int, records: Sequence[Record]) -> None:
    """Writes the records since the last segment; replaces what an earlier attempt left at this step.

    The segment appears atomically: its images are written first, its lines last.

    Raises:
        OSError: the write failed, on a full disk for instance. No segment exists then; keep the records and retry.
    """
    folder = run / FOLDER
    name = f"{step:08d}"
    _remove_segment(run, step)
    earlier = [other for other in segment_steps(run) if other < step]
    lines: list[dict[str, Any]] = [{"format": FORMAT, "step": step, "after": earlier[-1] if earlier else -1}]
    images = 0
    for record in records:
        when = {"step": record.step, "time_ms": record.time_ms}
        if isinstance(record, Metrics):
            values = {key: _to_json(value) for key, value in record.values.items()}
            lines.append({"kind": "metrics", **when, "values": values})
        elif isinstance(record, ImageRecord):
            file = f"{name}/{images:04d}.png"
            folder.write_bytes(file, encoded(record.image, "PNG"))
            lines.append({"kind": "image", **when, "key": record.key, "file": file})
            images += 1
        else:
            lines.append({"kind": "event", **when, "text": record.text})
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    folder.write_bytes(f"{name}.jsonl", text.encode())


def read_segment(run: Storage, step: int) -> Segment:
    """Reads the segment of `step`.

    Raises:
        FileNotFoundError: there is none.
        CorruptSegment: its content, or one of its images, cannot be read.
    """
    folder = run / FOLDER
    file = f"{step:08d}.jsonl"
    content = folder.read_bytes(file)
    try:
        header, *lines = [json.loads(line) for line in content.decode().splitlines()]
        return Segment(step, int(header["after"]), [_record(folder, line) for line in lines])
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise CorruptSegment(f"{folder.path(file)}: corrupt segment ({error})") from None


def segment_steps(run: Storage) -> list[int]:
    """Steps of all segments, ascending; including those without a published checkpoint."""
    return sorted(int(match[1]) for name in run.names(FOLDER) if (match := _NAME.match(name)))


def validations(run: Storage) -> dict[int, dict[str, float]]:
    """The metrics of every validation, by step, in order; a step that was trained again has its last values.

    A corrupt segment is skipped; images are not read.
    """
    found: dict[int, dict[str, float]] = {}
    for step in segment_steps(run):
        try:
            lines = [json.loads(line) for line in (run / FOLDER).read_bytes(f"{step:08d}.jsonl").splitlines()]
            for line in lines:
                for key, value in line.get("values", {}).items():
                    if key.startswith(VALIDATION):
                        found.setdefault(int(line["step"]), {})[key.removeprefix(VALIDATION)] = float(value)
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
            continue
    return dict(sorted(found.items()))


def images_at(run: Storage, step: int) -> dict[str, np.ndarray]:
    """The images of `step` by key, from its segment; empty if that is missing or corrupt."""
    try:
        records = read_segment(run, step).records
    except (FileNotFoundError, CorruptSegment):
        return {}
    return {
        record.key: record.image
        for record in records
        if isinstance(record, ImageRecord) and record.step == step
    }


def discard_after(run: Storage, step: int) -> None:
    """Removes segments later than `step`; called before training resumes from a checkpoint at `step`.

    They come from an attempt that ended before its next checkpoint; their steps are trained again.
    """
    for later in segment_steps(run):
        if later > step:
            _remove_segment(run, later)


def published_step(run: Storage) -> int:
    """Step of the newest checkpoint that has a manifest; -1 without one."""
    steps = [(int(match[1]), name) for name in run.names("checkpoints") if (match := _CHECKPOINT.match(name))]
    for step, name in sorted(steps, reverse=True):
        if run.exists(f"checkpoints/{name}/manifest.json"):
            return step
    return -1


def now_ms() -> int:
    """The time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def from_png(content: bytes) -> np.ndarray:
    """The image in a PNG file's bytes, (H, W, 3) uint8 RGB. Raises ValueError."""
    try:
        return decoded(content)
    # Pillow's errors; those of the storage are raised before.
    except (OSError, SyntaxError) as error:
        raise ValueError(f"corrupt PNG file: {error}") from None


def _remove_segment(run: Storage, step: int) -> None:
    # The lines first: a segment without them does not exist.
    (run / FOLDER).remove(f"{step:08d}.jsonl")
    (run / FOLDER).remove(f"{step:08d}")


def _record(folder: Storage, line: dict[str, Any]) -> Record:
    step, time_ms = int(line["step"]), int(line["time_ms"])
    if line["kind"] == "metrics":
        return Metrics(step, time_ms, {key: float(value) for key, value in line["values"].items()})
    if line["kind"] == "image":
        return ImageRecord(step, time_ms, line["key"], from_png(folder.read_bytes(line["file"])))
    return Event(step, time_ms, line["text"])


def _to_json(value: float) -> float | str:
    """JSON has no NaN and infinity: they are written as strings, which float() parses."""
    value = float(value)
    return value if math.isfinite(value) else repr(value)
