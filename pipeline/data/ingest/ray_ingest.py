"""Cutting photographs on Ray: the only file of ingest that knows it."""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from pipeline.data.config import DataConfig
from pipeline.data.ingest.cutting import PhotoJob, cut_photo
from pipeline.errors import UserError

STORE_BYTES = 512 * 2**20
# More tasks than this cost more than they spread.
MOST_TASKS = 10_000


def join_ray(dashboard: bool = False) -> None:
    """Joins the Ray that RAY_ADDRESS names, or starts a private one that ends with this process.

    A Ray that only happens to run on the machine is left alone.

    Raises:
        UserError: nothing answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # An explicit mode: a token file left in the home directory must not change what happens here.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        if address:
            ray.init(address=address, log_to_driver=True)
        else:
            # A dashboard on any free port: the usual one belongs to a Ray that takes jobs.
            ray.init(address="local", include_dashboard=dashboard, dashboard_port=0, log_to_driver=True)
    except ConnectionError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray answers there ({error}); start it or unset it"
        ) from None


def cut_on_ray(jobs: Sequence[PhotoJob], config: DataConfig, paired: bool) -> Iterator[pa.Table]:
    """What `cut_photos` gives, in the same order, made by tasks all over the cluster.

    Each task reads and cuts one photograph, or a few where there are very many; Ray Data holds tasks back when results
    wait to be written.
    """
    if not jobs:
        return
    # Ray Data's own account of its plan and its end says nothing to the user, in the middle of our progress.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False  # ours counts photographs
    try:
        places = ray.data.from_items(
            [{"place": place} for place in range(len(jobs))], override_num_blocks=min(len(jobs), MOST_TASKS)
        )
        shared = ray.put(list(jobs))

        def cut(batch: pa.Table) -> Iterator[pa.Table]:
            for place in batch["place"].to_pylist():
                yield from cut_photo(_jobs(shared)[place], config, paired)

        tables = places.map_batches(cut, batch_format="pyarrow", batch_size=1, zero_copy_batch=True)
        options = tables.context.execution_options
        options.preserve_order = True
        options.resource_limits = options.resource_limits.copy(object_store_memory=STORE_BYTES)
        yield from tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    finally:
        context.enable_progress_bars = before


@lru_cache(maxsize=1)
def _jobs(shared: ray.ObjectRef) -> list[PhotoJob]:
    """The whole plan, unpacked once in each worker process instead of for each photograph."""
    return ray.get(shared)
