"""Upscales images of any size: files, folders, object stores. The same call resumes an interrupted one."""

import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow

from pipeline.data.ingest.decoding import PhotoRejected
from pipeline.errors import UserError
from pipeline.evaluation.config import UpscaleConfig
from pipeline.evaluation.image_files import SourceImage, encode_output, read_source, resized
from pipeline.evaluation.models import Model, choose_device, notes, open_model
from pipeline.evaluation.output_plan import Task, is_file, plan
from pipeline.evaluation.output_record import OutputRecord, claim
from pipeline.imaging import DeepImage, bicubic_upscale
from pipeline.imaging.tiling import Tile
from pipeline.model import generator_sha256
from pipeline.progress import progress_bar
from pipeline.storage import Storage

READ_AHEAD = 2
MAX_WAITING_BYTES = 256 * 2**20


@dataclass
class Work:
    """An image between two stages, and what happened to it; without an error its output was written."""

    task: Task
    image: SourceImage | None = None
    pixels: DeepImage | None = None
    error: str = ""
    """Why this image failed; the other stages then do nothing."""
    write_error: str = ""
    """Why the output folder cannot be written."""

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Records what can be wrong with one image; the others are still upscaled."""
        try:
            yield
        except (PhotoRejected, FloatingPointError) as error:
            self.error = str(error)
        except (OSError, pyarrow.ArrowException) as error:
            self.error = str(error).splitlines()[0]
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            self.error = "out of memory; lower --tile"


@dataclass(frozen=True)
class Upscaled:
    """Result of a call, by addresses."""

    written: list[str] = field(default_factory=list)
    """New outputs."""
    skipped: list[str] = field(default_factory=list)
    """Outputs that existed."""
    failed: list[dict[str, str]] = field(default_factory=list)
    """`path` of the image and `reason`."""


@dataclass(frozen=True)
class Upscaler:
    """Upscales one image; Ray's workers receive it as a value."""

    model: Model
    output: Storage
    config: UpscaleConfig
    shows_tiles: bool = False

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
            "format": self.config.format,
            "precision": self.model.precision,
            **({} if self.config.outscale is None else {"outscale": self.config.outscale}),
        }

    def __call__(self, task: Task) -> Work:
        """Reads, upscales and writes one image; the output is written atomically."""
        return self.write(self.compute(self.read(task)))

    def read(self, task: Task) -> Work:
        """Decodes the image."""
        work = Work(task)
        with work.failures():
            work.image = read_source(task.photo.read(), self.config.max_megapixels)
        return work

    def compute(self, work: Work) -> Work:
        """Upscales it on the device."""
        with work.failures():
            if work.image is not None:
                progress = _tiles_bar if self.shows_tiles else iter
                work.pixels = self.model.upscale(work.image.rgb, self.config.tile, progress)
        return work

    def write(self, work: Work) -> Work:
        """Encodes and writes the output."""
        content = b""
        with work.failures():
            if work.image is not None and work.pixels is not None:
                alpha, scale, outscale = work.image.alpha, self.model.scale, self.config.outscale
                alpha = alpha if alpha is None or scale == 1 else bicubic_upscale(alpha, scale)
                if outscale is not None:
                    size = [max(round(side * outscale), 1) for side in work.image.rgb.shape[:2]]
                    work.pixels = resized(work.pixels, size)
                    alpha = None if alpha is None else resized(alpha, size)
                content = encode_output(work.pixels, alpha, work.image, work.task.form)
        work.image = work.pixels = None
        try:
            if not work.error:
                self.output.write_bytes(work.task.target, content)
        except (OSError, pyarrow.ArrowException) as error:
            if getattr(error, "errno", None) == errno.ENAMETOOLONG:
                work.error = f"the output's name is too long ({work.task.target})"
            else:
                work.write_error = str(error).splitlines()[0]
        return work

    def all(self, tasks: Sequence[Task]) -> Iterator[Work]:
        """Every task, in order; while one image is computed, others are decoded and encoded by threads.

        At most READ_AHEAD decoded images and MAX_WAITING_BYTES of computed ones are in memory in addition to it.
        """
        encoders = max(1, (os.cpu_count() or 1) - 1)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(encoders) as writer:
            names = iter(tasks)
            reads = deque(reader.submit(self.read, task) for task in islice(names, READ_AHEAD))
            writes: deque[tuple[int, Future[Work]]] = deque()
            try:
                while reads:
                    work = self.compute(reads.popleft().result())
                    reads.extend(reader.submit(self.read, task) for task in islice(names, 1))
                    size = 0 if work.pixels is None else work.pixels.nbytes
                    writes.append((size, writer.submit(self.write, work)))
                    while writes and (
                        writes[0][1].done() or sum(size for size, _ in writes) > MAX_WAITING_BYTES
                    ):
                        yield writes.popleft()[1].result()
                for _, written in writes:
                    yield written.result()
            finally:
                # What was computed is still written.
                for unread in reads:
                    unread.cancel()


def upscale_images(config: UpscaleConfig) -> Upscaled:
    """Upscales the images of `config.input` that have no output yet, in this process or on Ray's workers.

    Notes about the model are printed.

    Raises:
        UserError: an unusable model, device, input or output (see also `plan`); the folder has outputs of another
            model, other settings or other inputs, and `overwrite` is off; or an output cannot be written (a full disk),
            which would also stop the others.
    """
    output, tasks = plan(config.input, config.output, config.format)
    to_file = is_file(config.output)
    if to_file and not config.overwrite and output.exists(tasks[0].target):
        raise UserError(f"--output {config.output}: the file exists; --overwrite replaces it")
    output.require_writable("--output")
    device = choose_device(config.device, config.workers)
    model = open_model(config.model, config.tracking_uri, device=device, precision=config.precision)
    for line in notes([model]):
        print(f"note: {line}")
    # Ray's workers need no tracking server: its password stays here.
    shared = config.model_copy(update={"tracking_uri": None})
    upscaler = Upscaler(model, output, shared, shows_tiles=len(tasks) == 1 and config.workers == 0)
    record = OutputRecord(model.name, upscaler.settings(), {task.target: task.photo.path for task in tasks})
    existing = set() if to_file else claim(output, record, config.overwrite)
    skipped = set() if config.overwrite else existing
    pending = [task for task in tasks if task.target not in skipped]
    works: Iterable[Work] = upscaler.all(pending)
    if config.workers and pending:
        from pipeline.evaluation.ray_workers import map_on_ray

        works = map_on_ray(upscaler, pending, config.workers, model.device)
    if len(pending) > 1:
        works = progress_bar(works, total=len(pending), unit=" images")
    result = Upscaled(skipped=sorted(map(output.path, skipped)))
    for work in works:
        photo = work.task.photo
        if work.write_error:
            raise UserError(
                f"--output {output.uri}: the output of {photo.name} cannot be written ({work.write_error}); "
                f"{len(result.written)} were written; free space and run again to resume"
            )
        if work.error:
            result.failed.append({"path": photo.path, "reason": work.error})
        else:
            result.written.append(output.path(work.task.target))
    result.written.sort()
    result.failed.sort(key=lambda entry: entry["path"])
    return result


def _tiles_bar(tiles: list[Tile]) -> Iterable[Tile]:
    return tiles if len(tiles) == 1 else progress_bar(tiles, unit=" tiles")
