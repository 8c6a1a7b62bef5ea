"""Cuts images in Ray Data tasks. The only module of ingest that imports ray."""

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, groupby
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from pipeline.data.config import DataConfig
from pipeline.data.ingest.cutting import CUT_SCHEMA, CutImage, ImageJob, Rejection, cut_image
from pipeline.errors import UserError

OBJECT_STORE_MEMORY = 512 * 2**20
# More tasks cost more than the parallelism gains.
MAX_TASKS = 10_000
# What a task returns to the driver: the image's facts or the reason for its rejection, and some of its patches.
ROWS = pa.schema(
    [
        ("index", pa.int32()),
        ("reason", pa.string()),
        ("facts", pa.string()),
        ("patches", pa.list_(pa.struct(list(CUT_SCHEMA)))),
    ]
)
_EMPTY = CUT_SCHEMA.empty_table()


def join_ray(dashboard: bool = False, **options: Any) -> None:
    """Connects to the Ray cluster at RAY_ADDRESS, or starts a private one that ends with this process.

    Does not attach to an unrelated Ray cluster on this machine.

    Args:
        dashboard: whether a private cluster has the dashboard.
        options: other arguments of `ray.init`.

    Raises:
        UserError: no cluster answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    require_ray_address()
    if not address:
        # Set explicitly: a stale token file in the home directory would change the mode.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Any free port: the default one belongs to a cluster that accepts jobs.
        options |= {"include_dashboard": dashboard, "dashboard_port": 0}
    try:
        ray.init(address=address or "local", **options)
    except ConnectionError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers ({error}); start it or unset the variable"
        ) from None


def require_ray_address() -> None:
    """Raises UserError if RAY_ADDRESS is HOST:PORT and nothing listens there: `ray.init` would retry for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # unset, `auto` or `local`
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers ({error}); start it or unset the variable"
        ) from None


def cut_on_ray(jobs: Sequence[ImageJob], config: DataConfig, paired: bool) -> Iterator[CutImage | Rejection]:
    """`cut_image` of every job, in order, by tasks on all nodes of the cluster.

    Each task processes one image, or a few if there are very many; Ray Data throttles the tasks while their results
    wait to be written. An image's tables must be consumed before the next image is requested.
    """
    if not jobs:
        return
    # Ray Data's execution logs interleave with our progress bar.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    progress_bars = context.enable_progress_bars
    context.enable_progress_bars = False  # ours counts images
    try:
        indices = ray.data.from_items(
            [{"index": index} for index in range(len(jobs))], override_num_blocks=min(len(jobs), MAX_TASKS)
        )
        shared = ray.put(list(jobs))

        def cut(batch: pa.Table) -> Iterator[pa.Table]:
            for index in batch["index"].to_pylist():
                yield from _rows(index, cut_image(_jobs(shared)[index], config, paired))

        blocks = indices.map_batches(cut, batch_format="pyarrow", batch_size=1, zero_copy_batch=True)
        options = blocks.context.execution_options
        options.preserve_order = True
        options.resource_limits = options.resource_limits.copy(object_store_memory=OBJECT_STORE_MEMORY)
        tables = blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        rows = (table.slice(row, 1) for table in tables for row in range(table.num_rows))
        for _, of_image in groupby(rows, key=lambda row: row["index"][0].as_py()):
            yield _image(of_image)
    finally:
        context.enable_progress_bars = progress_bars


def _rows(index: int, image: CutImage | Rejection) -> Iterator[pa.Table]:
    """An image as rows of `ROWS`: one per table of its patches, and one if it has none."""
    if isinstance(image, Rejection):
        yield _row(index, image.reason, None, _EMPTY)
        return
    facts, empty = json.dumps(image.facts), True
    for table in image.tables:
        yield _row(index, None, facts, table)
        empty = False
    if empty:
        yield _row(index, None, facts, _EMPTY)


def _row(index: int, reason: str | None, facts: str | None, patches: pa.Table) -> pa.Table:
    structs = patches.combine_chunks().to_struct_array().combine_chunks()
    columns = [
        pa.array([index], pa.int32()),
        pa.array([reason], pa.string()),
        pa.array([facts], pa.string()),
        pa.ListArray.from_arrays(pa.array([0, len(structs)], pa.int32()), structs),
    ]
    return pa.Table.from_arrays(columns, schema=ROWS)


def _image(rows: Iterator[pa.Table]) -> CutImage | Rejection:
    """The inverse of `_rows`; reads the rows as the tables are consumed."""
    first = next(rows)
    reason = first["reason"][0].as_py()
    if reason is not None:
        return Rejection(reason)
    tables = (pa.Table.from_struct_array(row["patches"][0].values) for row in chain([first], rows))
    return CutImage(json.loads(first["facts"][0].as_py()), (table for table in tables if table.num_rows))


@lru_cache(maxsize=1)
def _jobs(shared: ray.ObjectRef) -> list[ImageJob]:
    """The whole plan, fetched once per worker process instead of once per image."""
    return ray.get(shared)
