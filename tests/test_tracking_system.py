"""System metrics: MLflow's names, plausible values, and no GPU initialized by the query."""

import pytest
import torch

from pipeline.tracking import system_metrics as system_metrics_module
from pipeline.tracking.system_metrics import system_metrics


def test_the_metrics_have_mlflows_names() -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    known = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        known |= {f"system/{name}" for name in monitor.metrics}
    system_metrics()
    values = system_metrics()
    assert set(values) <= known
    assert all(0 <= values[name] <= 100 for name in values if name.endswith("percentage"))
    assert values["system/system_memory_usage_megabytes"] > 1
    assert not torch.cuda.is_initialized()


def test_traffic_counts_from_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    system_metrics_module._first_traffic.cache_clear()
    counted = iter([5e6, 5e6, 5e6, 7e6, 7e6])
    monkeypatch.setattr(
        "psutil.net_io_counters",
        lambda: SimpleNamespace(bytes_recv=(now := next(counted)), bytes_sent=2 * now),
    )
    assert system_metrics()["system/network_receive_megabytes"] == 0.0
    assert system_metrics()["system/network_transmit_megabytes"] == 4.0
    system_metrics_module._first_traffic.cache_clear()


@pytest.mark.parametrize("has_nvml", [True, False])
def test_a_gpu_in_use_is_measured(monkeypatch: pytest.MonkeyPatch, has_nvml: bool) -> None:
    def utilization(device: int) -> int:
        if not has_nvml:
            raise ModuleNotFoundError("pynvml")
        return 93

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60e9, 80e9))
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 350_000)
    values = {name: value for name, value in system_metrics().items() if "gpu" in name}
    expected = {"system/gpu_1_memory_usage_megabytes": 20_000.0, "system/gpu_1_memory_usage_percentage": 25.0}
    if has_nvml:
        expected |= {"system/gpu_1_utilization_percentage": 93.0, "system/gpu_1_power_usage_watts": 350.0}
    assert values == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_is_measured() -> None:
    torch.zeros(1, device="cuda")
    values = system_metrics()
    assert 0 < values[f"system/gpu_{torch.cuda.current_device()}_memory_usage_percentage"] <= 100
