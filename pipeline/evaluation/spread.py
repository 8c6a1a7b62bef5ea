"""Spreads work on many pictures over a Ray cluster; the only file of this room that knows Ray."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from pipeline.errors import UserError

# A block is what a worker takes at a time: few pictures, so that all workers end together.
_BLOCKS_PER_WORKER = 64


class _Applied:
    """A worker: it gets the function and the items once, then numbers."""

    def __init__(self, work: ray.ObjectRef, on_gpu: bool) -> None:
        if not on_gpu:
            # Ray does not always hide GPUs from an actor that has reserved none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._function, self._items = ray.get(work)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"outcome": json.dumps(self._function(self._items[row["index"]]))}


def spread(
    function: Callable[[Any], dict[str, Any]], items: Sequence[Any], workers: int, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """`function` of every item on `workers` Ray actors, as outcomes come in, in any order.

    Uses the Ray that the environment names (RAY_ADDRESS), or starts one on this machine and stops it at the end.

    Args:
        function: picklable; called in the workers; what it returns can be written as JSON.
        items: picklable.
        workers: actors, of one CPU each.
        device: cuda: each actor reserves a GPU; auto: so it does where the cluster has enough of them; cpu.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than that.
    """
    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = (
            {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
        )
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        there = ray.cluster_resources()
        on_gpu = device == "cuda" or (device == "auto" and there.get("GPU", 0) >= workers)
        gpus_per_worker = 1 if on_gpu else 0
        for name, needed in (("CPU", workers), ("GPU", workers * gpus_per_worker)):
            if needed > there.get(name, 0):
                raise UserError(
                    f"--workers {workers}: needs {needed:g} {name}s, and Ray has {there.get(name, 0):g}"
                )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        blocks = max(1, min(len(items), workers * _BLOCKS_PER_WORKER))
        numbers = ray.data.from_items(
            [{"index": index} for index in range(len(items))], override_num_blocks=blocks
        )
        applied = numbers.map(
            _Applied,
            fn_constructor_args=(ray.put((function, list(items))), on_gpu),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=gpus_per_worker or None,
        )
        for row in applied.iter_rows():
            yield json.loads(row["outcome"])
    finally:
        if ours:
            ray.shutdown()
