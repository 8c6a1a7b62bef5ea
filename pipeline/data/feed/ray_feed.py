"""Batches through Ray Data, and the choice between it and the prefetch thread."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayTaskError

from pipeline.data.feed.fetch import RawBatch, empty_images, fetch_steps, opened
from pipeline.data.feed.samples import Samples, rank_share
from pipeline.data.feed.thread_feed import Feed
from pipeline.data.format.manifest import load_manifest
from pipeline.data.format.reader import PatchReader
from pipeline.errors import UserError
from pipeline.storage import is_remote

# Several steps per block and blocks per task amortize Ray's per-block and per-task overhead; few tasks keep the time to
# the first batch low.
STEPS_PER_BLOCK = 16
BLOCK_BYTES = 16 * 2**20
BLOCKS_PER_TASK = 4
MAX_TASKS = 1500
# Without a limit Ray Data prefetches hundreds of steps; with a lower one, only one of its two tasks can run.
OBJECT_STORE_MEMORY = 384 * 2**20
# Ray Data's executor uses about one core per worker while it is throttled.
CORES_FOR_RAY = 4.0

Transport = Literal["thread", "ray"]


@dataclass(frozen=True)
class RayFeed(Feed):
    """The same batches, read and cropped by Ray Data's tasks; they run on any node, so `local_cache` is not used."""

    def _fetched(self, first_step: int, last_step: int, pinned: bool) -> Generator[RawBatch, None, None]:
        if first_step >= last_step:
            return
        source = StepSource(self, first_step, last_step)
        dataset = ray.data.read_datasource(
            source,
            override_num_blocks=source.tasks,
            # Workers may occupy every CPU; a task that waited for one would hang the run without a message.
            num_cpus=0,
            concurrency=2,
        )
        context = dataset.context
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
            object_store_memory=OBJECT_STORE_MEMORY
        )
        context.enable_progress_bars = False
        # Validation consumes no batches; disable the no-progress timeout.
        context.execution_no_progress_timeout_s = -1
        # A split of one runs the executor in a separate process; in this one it would compete with the training step
        # for the interpreter lock.
        (split,) = dataset.streaming_split(1)
        expected = first_step
        try:
            with closing(
                iter(split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
            ) as blocks:
                for block in blocks:
                    for step, batch in _unpacked(block, self.crop_px, pinned):
                        if step != expected:
                            raise RuntimeError(f"Ray Data returned step {step}, expected {expected}")
                        expected += 1
                        yield batch
        except RayTaskError as error:
            cause = error.as_instanceof_cause()
            if isinstance(cause, UserError):
                raise UserError(str(error.cause).splitlines()[0]) from None  # Ray appends advice
            raise


def with_transport(
    feed: Feed,
    transport: Literal["auto", "ray", "thread"],
    worker_nodes: Sequence[str],
    cpus_per_worker: float,
) -> Feed:
    """The feed that a worker uses; rank 0 prints the transport and the reason.

    Args:
        feed: the worker's share of the batches, through a thread.
        transport: the field `data.feed`.
        worker_nodes: Ray's id of each worker's node, so that all workers make the same choice.
        cpus_per_worker: CPUs that each worker reserves.
    """
    reason = "as configured"
    if transport == "auto":
        local = not is_remote(feed.root) or feed.local_cache is not None
        if local and load_manifest(feed.root).codec == "raw":
            transport, reason = "thread", "raw patches on a local disk"
        else:
            cpus = {
                node["NodeID"]: float(node["Resources"].get("CPU", 0.0))
                for node in ray.nodes()
                if node["Alive"]
            }
            transport, reason = choose(cpus, worker_nodes, feed.world_size, cpus_per_worker)
    if feed.rank == 0:
        print(f"data.feed: {transport} ({reason})", flush=True)
    return RayFeed(**asdict(feed)) if transport == "ray" else feed


def choose(
    cpus_of_nodes: Mapping[str, float], worker_nodes: Sequence[str], world_size: int, cpus_per_worker: float
) -> tuple[Transport, str]:
    """For patches that are decoded or downloaded: `ray` or `thread`, and the reason.

    Ray Data needs a spare CPU per worker, on another node or among many cores. Raw patches on a local disk do not need
    it: a thread reads nine times as many as a GPU takes.
    """
    total = sum(cpus_of_nodes.values())
    spare = (total - world_size * cpus_per_worker) / world_size
    elsewhere = sum(cpus for node, cpus in cpus_of_nodes.items() if node not in worker_nodes) / world_size
    if worker_nodes and elsewhere >= 1:
        return "ray", f"{elsewhere:.3g} CPUs per worker on other nodes"
    if total / world_size >= CORES_FOR_RAY and spare >= 1:
        return "ray", f"{spare:.3g} spare CPUs per worker"
    return (
        "thread",
        f"{spare:.3g} spare CPUs and {total / world_size:.3g} in total per worker are too few for Ray Data",
    )


class StepSource(Datasource):
    """A data set whose rows are one worker's batches of consecutive steps."""

    def __init__(self, feed: Feed, first_step: int, last_step: int) -> None:
        manifest = load_manifest(feed.root)
        self._feed, self._first, self._last, self._sha256 = feed, first_step, last_step, manifest.sha256
        first, last = rank_share(feed.batch_size, feed.rank, feed.world_size)
        self._step_bytes = 3 * (last - first) * (feed.crop_px**2 + (feed.crop_px // manifest.scale) ** 2)
        self._block_steps = max(1, min(STEPS_PER_BLOCK, BLOCK_BYTES // max(1, self._step_bytes)))
        task_steps = BLOCKS_PER_TASK * self._block_steps
        self.tasks = min(MAX_TASKS, -(-(last_step - first_step) // task_steps))

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all steps."""
        return self._step_bytes * (self._last - self._first)

    def get_read_tasks(self, parallelism: int, *args: Any, **more: Any) -> list[ReadTask]:
        """One task per range of consecutive steps."""
        edges = np.linspace(self._first, self._last, self.tasks + 1).round().astype(int).tolist()
        tasks = []
        for first, last in pairwise(edges):
            metadata = BlockMetadata(
                num_rows=last - first,
                size_bytes=self._step_bytes * (last - first),
                input_files=None,
                exec_stats=None,
            )
            fetch = partial(_fetch_blocks, self._feed, self._sha256, range(first, last), self._block_steps)
            tasks.append(ReadTask(fetch, metadata))
        return tasks


def _fetch_blocks(feed: Feed, manifest_sha256: str, steps: range, block_steps: int) -> Iterator[pa.Table]:
    """The work of one task: the batches of `steps`, block by block."""
    reader, samples = _shared_reader(feed.root, manifest_sha256, feed.seed, feed.batch_size, feed.crop_px)
    share = rank_share(feed.batch_size, feed.rank, feed.world_size)
    with closing(fetch_steps(reader, samples, steps, *share)) as batches:
        for start in range(0, len(steps), block_steps):
            block = steps[start : start + block_steps]
            yield _packed(block, list(islice(batches, len(block))))


@lru_cache(maxsize=4)
def _shared_reader(
    root: str, manifest_sha256: str, seed: int, batch_size: int, crop_px: int
) -> tuple[PatchReader, Samples]:
    """Consecutive tasks in one process share open files."""
    manifest = load_manifest(root)
    if manifest.sha256 != manifest_sha256:
        raise UserError(
            f"data.root={root}: the data set was prepared again after training started; restart the run"
        )
    return opened(manifest, seed, batch_size, crop_px)


def _packed(steps: Sequence[int], batches: Sequence[RawBatch]) -> pa.Table:
    """One row per step; pixels as the bytes of (B, h, w, 3)."""
    columns = {
        "step": pa.array(steps, pa.int64()),
        "corrupt": pa.array([batch.corrupt for batch in batches], pa.int64()),
    }
    for name in ("lr", "hr"):
        images = np.stack([getattr(batch, name) for batch in batches])
        kind = pa.binary(images[0].nbytes)
        columns[name] = pa.Array.from_buffers(kind, len(images), [None, pa.py_buffer(images)])
    return pa.table(columns)


def _unpacked(block: pa.Table, crop_px: int, pinned: bool) -> Iterator[tuple[int, RawBatch]]:
    for row in range(block.num_rows):
        cells = {name: block[name][row].as_buffer() for name in ("lr", "hr")}
        count = len(cells["hr"]) // (3 * crop_px**2)
        pixels = {}
        for name, cell in cells.items():
            side = round((len(cell) / (3 * count)) ** 0.5)
            # A copy: the block's memory is shared and read-only, and Ray needs it back.
            pixels[name] = empty_images((count, side, side, 3), pinned)
            pixels[name][...] = np.frombuffer(cell, np.uint8).reshape(pixels[name].shape)
        yield block["step"][row].as_py(), RawBatch(**pixels, corrupt=block["corrupt"][row].as_py())
