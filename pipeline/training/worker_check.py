"""What a worker's machine needs, checked before the worker joins its process group."""

import os
import platform

from pipeline.data.format.local_copy import local_copy
from pipeline.errors import UserError
from pipeline.model.device import require_gpu
from pipeline.training.checks import require_shared_memory

NCCL_HEARTBEAT_S = 60


def prepare_worker(use_gpu: bool, several: bool, root: str, local_cache: str | None) -> str:
    """Checks driver and shared memory, and copies the data set; returns what is missing, or an empty text.

    The copy takes minutes: in the process group, others would wait for it in a collective.

    Args:
        use_gpu: whether the worker trains on a GPU.
        several: whether there are several workers.
        root: the data set.
        local_cache: folder for its copy, if it is remote.
    """
    # A collective that timed out ends the process; without these the watchdog first collects state for minutes.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(NCCL_HEARTBEAT_S))
    try:
        if several:
            require_shared_memory(use_gpu)
        if use_gpu:
            require_gpu(f"use_gpu=true, {platform.node()}", "set use_gpu=false")
        local_copy(root, local_cache)
    except UserError as error:
        return str(error)
    return ""
