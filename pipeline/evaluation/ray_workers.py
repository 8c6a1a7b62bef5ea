"""Applies a function to many images on a Ray cluster; the only module of this package that imports ray."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError
from ray.util import ActorPool

from pipeline.data.ingest.ray_ingest import join_ray
from pipeline.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# A worker that dies (out of memory, a lost node) is restarted, and its image attempted again, this many times.
_RETRIES = 3


class _Worker:
    """Receives the function once, as a reference in a list: an argument would be loaded before GPUs are hidden."""

    def __init__(self, function: list[ray.ObjectRef], on_gpu: bool) -> None:
        if not on_gpu:
            # Ray does not always hide GPUs from an actor that has reserved none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._function = ray.get(function[0])

    def apply(self, item: Any) -> Any:
        return self._function(item)


def map_on_ray(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, device: str = "cpu"
) -> Iterator[Result]:
    """`function` of every item on `workers` Ray actors, as results arrive, in any order.

    Joins the cluster of RAY_ADDRESS, or starts Ray on this machine and stops it at the end.

    Args:
        function: picklable; called in the actors.
        items: picklable.
        workers: actors, of one CPU each.
        device: cuda: each actor reserves a GPU; auto: the same if the cluster has enough of them; cpu.

    Raises:
        UserError: no cluster answers at RAY_ADDRESS, or it has fewer CPUs or GPUs than that; or as `function`.
    """
    started = not ray.is_initialized()
    if started:
        join_ray(log_to_driver=False, logging_level="ERROR")
    try:
        resources = ray.cluster_resources()
        on_gpu = device == "cuda" or (device == "auto" and resources.get("GPU", 0) >= workers)
        for name, needed in (("CPU", workers), ("GPU", workers * on_gpu)):
            if needed > resources.get(name, 0):
                raise UserError(
                    f"--workers {workers}: needs {needed:g} {name}s, and Ray has {resources.get(name, 0):g}"
                )
        actor = ray.remote(
            num_cpus=1, num_gpus=int(on_gpu), max_restarts=_RETRIES, max_task_retries=_RETRIES
        )(_Worker)
        shared = [ray.put(function)]
        pool = ActorPool([actor.remote(shared, on_gpu) for _ in range(min(workers, len(items)))])
        yield from pool.map_unordered(lambda worker, item: worker.apply.remote(item), items)
    except RayTaskError as error:
        # Without the worker's traceback.
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    finally:
        if started:
            ray.shutdown()
