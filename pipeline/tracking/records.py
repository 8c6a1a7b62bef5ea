"""What training tells about itself, and the files in which it waits to be sent.

The loop writes one segment right before each checkpoint is published:

    tracking/00000200.jsonl     a header, then one record a line
    tracking/00000200/0000.png  the segment's pictures

A segment counts once a checkpoint with its step, or a later one, is published. What a run did after its last
checkpoint before a crash is thus never sent, and the curves have every point once.
"""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.storage import Storage

FOLDER = "tracking"
FORMAT = 1
_NAME = re.compile(r"^(\d{8,})\.jsonl$")
_CHECKPOINT = re.compile(r"^[a-z]+-(\d{8,})$")


@dataclass(frozen=True)
class Metrics:
    """Named values at a global step, at a time in milliseconds since 1970."""

    step: int
    time_ms: int
    values: dict[str, float]


@dataclass(frozen=True)
class Picture:
    """A picture under `key` at a global step; (H, W, 3) uint8 RGB. The same key over steps makes a slider."""

    step: int
    time_ms: int
    key: str
    image: np.ndarray


@dataclass(frozen=True)
class Event:
    """Something that happened once, in words: a restart, a change of the number of workers."""

    step: int
    time_ms: int
    text: str


Record = Metrics | Picture | Event


@dataclass(frozen=True)
class Segment:
    """A segment as it was written."""

    step: int
    after: int
    """Step of the segment before it when it was written; -1 for the first."""
    records: list[Record]


class DamagedSegment(Exception):
    """A segment that cannot be read; the message names the file."""


def write_segment(run: Storage, step: int, records: Sequence[Record]) -> None:
    """Writes the records since the last segment; replaces what an earlier try left at this step.

    The segment appears whole or not at all: its pictures are written first, its lines last.

    Raises:
        OSError: the storage refuses, a full disk for instance. Nothing counts then; keep the records and try again.
    """
    folder = run / FOLDER
    name = f"{step:08d}"
    folder.remove(f"{name}.jsonl")
    folder.remove(name)
    earlier = [other for other in segment_steps(run) if other < step]
    lines: list[dict[str, Any]] = [{"format": FORMAT, "step": step, "after": earlier[-1] if earlier else -1}]
    pictures = 0
    for record in records:
        place = {"step": record.step, "time_ms": record.time_ms}
        if isinstance(record, Metrics):
            values = {key: _to_json(value) for key, value in record.values.items()}
            lines.append({"kind": "metrics", **place, "values": values})
        elif isinstance(record, Picture):
            file = f"{name}/{pictures:04d}.png"
            folder.write_bytes(file, png(record.image))
            lines.append({"kind": "picture", **place, "key": record.key, "file": file})
            pictures += 1
        else:
            lines.append({"kind": "event", **place, "text": record.text})
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    folder.write_bytes(f"{name}.jsonl", text.encode())


def read_segment(run: Storage, step: int) -> Segment:
    """Reads the segment of `step`.

    Raises:
        FileNotFoundError: there is none.
        DamagedSegment: it does not read as one.
    """
    folder = run / FOLDER
    file = f"{step:08d}.jsonl"
    content = folder.read_bytes(file)
    try:
        header, *lines = [json.loads(line) for line in content.decode().splitlines()]
        return Segment(step, int(header["after"]), [_record(folder, line) for line in lines])
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DamagedSegment(f"{folder.path(file)}: not a whole segment ({error})") from None


def segment_steps(run: Storage) -> list[int]:
    """Steps of the segments that are there, ascending; also those that do not count yet."""
    return sorted(int(match[1]) for name in run.names(FOLDER) if (match := _NAME.match(name)))


def pictures_at(run: Storage, step: int) -> dict[str, np.ndarray]:
    """The pictures of `step` by key, from its segment; none where that is gone or unreadable."""
    try:
        records = read_segment(run, step).records
    except (FileNotFoundError, DamagedSegment):
        return {}
    return {
        record.key: record.image for record in records if isinstance(record, Picture) and record.step == step
    }


def discard_after(run: Storage, step: int) -> None:
    """Removes segments later than `step`: call it before training goes on from a checkpoint at `step`.

    They come from a try that ended before its checkpoint; their steps are about to be trained again.
    """
    for later in segment_steps(run):
        if later > step:
            (run / FOLDER).remove(f"{later:08d}.jsonl")
            (run / FOLDER).remove(f"{later:08d}")


def published_step(run: Storage) -> int:
    """Step of the newest checkpoint that is complete by its manifest's presence; -1 without one."""
    steps = [(int(match[1]), name) for name in run.names("checkpoints") if (match := _CHECKPOINT.match(name))]
    for step, name in sorted(steps, reverse=True):
        if run.exists(f"checkpoints/{name}/manifest.json"):
            return step
    return -1


def _record(folder: Storage, line: dict[str, Any]) -> Record:
    step, time_ms = int(line["step"]), int(line["time_ms"])
    if line["kind"] == "metrics":
        return Metrics(step, time_ms, {key: float(value) for key, value in line["values"].items()})
    if line["kind"] == "picture":
        with Image.open(io.BytesIO(folder.read_bytes(line["file"]))) as image:
            return Picture(step, time_ms, line["key"], np.asarray(image.convert("RGB")))
    return Event(step, time_ms, line["text"])


def _to_json(value: float) -> float | str:
    """JSON has no words for nan and infinity; float() reads these back."""
    value = float(value)
    return value if math.isfinite(value) else repr(value)


def png(image: np.ndarray) -> bytes:
    """A picture, (H, W, 3) uint8, as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
    return buffer.getvalue()
