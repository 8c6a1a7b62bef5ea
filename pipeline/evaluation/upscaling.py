"""Enlarges photographs of any size: files, folders, object stores. Goes on where it stopped."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow

from pipeline.data.ingest.decoding import PhotoRejected
from pipeline.errors import UserError
from pipeline.evaluation.layout import images_in
from pipeline.evaluation.models import Model
from pipeline.evaluation.output_record import OutputRecord, claim
from pipeline.evaluation.photo_files import SUFFIXES, read_source, write_copy
from pipeline.evaluation.progress import with_progress
from pipeline.imaging import bicubic_upscale
from pipeline.model import generator_sha256
from pipeline.storage import Storage


@dataclass(frozen=True)
class Task:
    """One photograph and the name of its copy, both relative to their folders."""

    name: str
    target: str


@dataclass(frozen=True)
class Upscaled:
    """What became of the photographs."""

    written: list[str] = field(default_factory=list)
    """Addresses of new files."""
    skipped: list[str] = field(default_factory=list)
    """Addresses of files that were there."""
    failed: list[dict[str, str]] = field(default_factory=list)
    """`path` and `reason`."""


@dataclass(frozen=True)
class Upscaler:
    """Enlarges one photograph; it travels to Ray's workers as a value."""

    model: Model
    source: Storage
    output: Storage
    form: str
    tile_px: int | None
    max_megapixels: float

    def settings(self) -> dict[str, Any]:
        """What an output depends on by more than a gray level, as JSON values.

        Tiles and devices change a pixel by at most one level, and a lower --tile must be able to resume a run that
        was out of memory.
        """
        generator = self.model.generator
        return {
            "generator_sha256": None if generator is None else generator_sha256(generator.state_dict()),
            "residual_scale": None if generator is None else generator.residual_scale,
            "scale": self.model.scale,
            "format": self.form,
            "precision": self.model.precision,
        }

    def __call__(self, task: Task) -> dict[str, str]:
        """`name`, and one of `target`, `failed` and `unwritable` (reasons). A file appears whole or not at all."""
        try:
            photo = read_source(self.source.read_bytes(task.name), self.max_megapixels)
            pixels = self.model.upscale(photo.rgb, self.tile_px)
            scale = self.model.scale
            alpha = photo.alpha if photo.alpha is None or scale == 1 else bicubic_upscale(photo.alpha, scale)
            copy = write_copy(pixels, alpha, photo, self.form)
        except (PhotoRejected, FloatingPointError) as error:
            return {"name": task.name, "failed": str(error)}
        except (OSError, pyarrow.ArrowException) as error:
            return {"name": task.name, "failed": str(error).splitlines()[0]}
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            return {"name": task.name, "failed": "out of memory; lower --tile"}
        try:
            self.output.write_bytes(task.target, copy)
        except (OSError, pyarrow.ArrowException) as error:
            return {"name": task.name, "unwritable": str(error).splitlines()[0]}
        return {"name": task.name, "target": task.target}


def plan(source: str, output: str, form: str) -> tuple[Storage, Storage, list[Task]]:
    """What is to be done: relative names are kept, and the suffix becomes the format's.

    Images whose outputs would have the same name keep their own suffix in front of the new one.

    Raises:
        UserError: no such folder or file, no images in it, or an output would replace an input.
    """
    folder, names = images_in(source, "--input")
    target = Storage(output)
    if target.uri == folder.uri:
        raise UserError(
            f"--output {output}: is the input's folder; choose another, so that nothing is overwritten"
        )
    # The copies of an earlier run may lie below the photographs.
    inside = (
        f"{target.uri}/".removeprefix(f"{folder.uri}/") if target.uri.startswith(f"{folder.uri}/") else None
    )
    names = [name for name in names if inside is None or not name.startswith(inside)]
    if not names:
        raise UserError(f"--input {source}: no photographs there besides the output")
    tasks = [Task(name, output_name) for name, output_name in _output_names(names, SUFFIXES[form]).items()]
    inputs = {folder.path(name) for name in names}
    for task in tasks:
        if target.path(task.target) in inputs:
            raise UserError(
                f"--output {output}: the output of {task.name} would replace the input {target.path(task.target)}; "
                "choose another folder"
            )
    return folder, target, tasks


def _output_names(names: Sequence[str], suffix: str) -> dict[str, str]:
    """A different output name for each input; they depend on the set of names, not on their order."""
    whole: set[str] = set()
    while True:
        outputs = {
            name: f"{name if name in whole else PurePosixPath(name).with_suffix('')}{suffix}"
            for name in names
        }
        counts = Counter(outputs.values())
        # a.jpg.png gives a.jpg.png, and so does a.jpg beside a.png: names that become whole can collide once more.
        shared = {name for name, output in outputs.items() if counts[output] > 1} - whole
        if not shared:
            return outputs
        whole |= shared


def upscale_all(
    upscaler: Upscaler, tasks: Sequence[Task], workers: int = 0, overwrite: bool = False
) -> Upscaled:
    """Upscales all images that have no output yet, in this process or on Ray's workers.

    Raises:
        UserError: the folder has outputs of another model, other settings or other inputs, and `overwrite` is off; or
            an output cannot be written (a full disk): the others could not be, either.
    """
    inputs = {task.target: upscaler.source.path(task.name) for task in tasks}
    record = OutputRecord(upscaler.model.name, upscaler.settings(), inputs)
    existing = claim(upscaler.output, record, overwrite)
    skipped = set() if overwrite else existing
    result = Upscaled(skipped=[upscaler.output.path(task.target) for task in tasks if task.target in skipped])
    left = [task for task in tasks if task.target not in skipped]
    for outcome in with_progress(_outcomes(upscaler, left, workers), len(left)):
        if "unwritable" in outcome:
            raise UserError(
                f"--output {upscaler.output.uri}: the copy of {outcome['name']} cannot be written "
                f"({outcome['unwritable']}); {len(result.written)} were written; make room and run again to go on"
            )
        if "failed" in outcome:
            result.failed.append({"path": upscaler.source.path(outcome["name"]), "reason": outcome["failed"]})
        else:
            result.written.append(upscaler.output.path(outcome["target"]))
    for entries in (result.written, result.skipped):
        entries.sort()
    result.failed.sort(key=lambda entry: entry["path"])
    return result


def _outcomes(upscaler: Upscaler, tasks: Sequence[Task], workers: int) -> Iterable[dict[str, Any]]:
    if workers == 0 or not tasks:
        return _here(upscaler, tasks)
    from pipeline.evaluation.spread import spread

    model = upscaler.model
    return spread(upscaler, tasks, workers, "cpu" if model.generator is None else model.device)


def _here(upscaler: Upscaler, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        yield upscaler(task)
