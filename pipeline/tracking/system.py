"""The machine's load, under the names that MLflow's page shows as system metrics.

MLflow's own monitor writes to the store from threads, and loses what it cannot write. These values go the way of all
other records: through the spool.
"""

from contextlib import suppress
from functools import cache

import psutil
import torch

MEGABYTE = 1e6


def system_metrics(folder: str = "/") -> dict[str, float]:
    """CPU, memory, disk and network of this machine, and this process's GPU once it computes on one.

    CPU load is the mean since the call before (0 at the first), network traffic the sum since the first call in this
    process. A call takes about a millisecond. GPU load and power are there where the package nvidia-ml-py is installed.

    Args:
        folder: a local folder, whose disk is meant.

    Returns:
        `system/...` to value.
    """
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(folder)
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / MEGABYTE,
    }
    if psutil.net_io_counters() is not None:  # A machine without interfaces has no counters.
        received, sent = _traffic_before()
        network = psutil.net_io_counters()
        values["network_receive_megabytes"] = (network.bytes_recv - received) / MEGABYTE
        values["network_transmit_megabytes"] = (network.bytes_sent - sent) / MEGABYTE
    # Looking must not claim memory on a GPU that nothing here uses.
    if torch.cuda.is_initialized():
        values |= _gpu_metrics(torch.cuda.current_device())
    return {f"system/{name}": float(value) for name, value in values.items()}


def _gpu_metrics(device: int) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(device)
    values = {
        "memory_usage_megabytes": (total - free) / MEGABYTE,
        "memory_usage_percentage": 100 * (total - free) / total,
    }
    # No nvidia-ml-py, or a driver that does not tell: each has errors of its own.
    with suppress(Exception):
        values["utilization_percentage"] = torch.cuda.utilization(device)
        values["power_usage_watts"] = torch.cuda.power_draw(device) / 1000
    return {f"gpu_{device}_{name}": value for name, value in values.items()}


@cache
def _traffic_before() -> tuple[int, int]:
    """Bytes received and sent up to the first call; the counters begin at the machine's start."""
    network = psutil.net_io_counters()
    return network.bytes_recv, network.bytes_sent
