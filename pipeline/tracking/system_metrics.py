"""The machine's load, under the names that MLflow groups as system metrics.

MLflow's own monitor writes to the server from threads and loses what it cannot write. These values are written to the
spool, as all other records are.
"""

from contextlib import suppress
from functools import cache

import torch

from pipeline.errors import is_installed

MEGABYTE = 1e6


def system_metrics(folder: str = "/") -> dict[str, float]:
    """Load of CPU, memory, disk and network of this machine, and of this process's GPU once CUDA is initialized.

    CPU load is the mean since the previous call (0 at the first), network traffic the sum since the first call in
    this process. The disk is that of `folder`. A call takes about a millisecond. GPU load and power need the package
    nvidia-ml-py, the others psutil. Names are `system/...`.
    """
    values = _machine_metrics(folder) if is_installed("psutil") else {}
    # A query must not initialize CUDA, which takes memory, on a GPU that this process does not use.
    if torch.cuda.is_initialized():
        values |= _gpu_metrics(torch.cuda.current_device())
    return {f"system/{name}": float(value) for name, value in values.items()}


def _machine_metrics(folder: str) -> dict[str, float]:
    import psutil

    memory, disk = psutil.virtual_memory(), psutil.disk_usage(folder)
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / MEGABYTE,
    }
    if psutil.net_io_counters() is not None:  # None on a machine without network interfaces.
        received, sent = _first_traffic()
        network = psutil.net_io_counters()
        values["network_receive_megabytes"] = (network.bytes_recv - received) / MEGABYTE
        values["network_transmit_megabytes"] = (network.bytes_sent - sent) / MEGABYTE
    return values


def _gpu_metrics(device: int) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(device)
    values = {
        "memory_usage_megabytes": (total - free) / MEGABYTE,
        "memory_usage_percentage": 100 * (total - free) / total,
    }
    # Without nvidia-ml-py, or with a driver that lacks these queries, different exceptions are raised.
    with suppress(Exception):
        values["utilization_percentage"] = torch.cuda.utilization(device)
        values["power_usage_watts"] = torch.cuda.power_draw(device) / 1000
    return {f"gpu_{device}_{name}": value for name, value in values.items()}


@cache
def _first_traffic() -> tuple[int, int]:
    """Bytes received and sent up to the first call; the counters start at zero when the machine boots."""
    import psutil

    network = psutil.net_io_counters()
    return network.bytes_recv, network.bytes_sent
