"""Measuring two ways in turns, and naming the machine. For the scripts of this folder."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def abba(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each way, two calls a round, in the order first, second, second, first.

    A drift of the clock, or another program's load, then affects both equally. Calls return when their work is done.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        pair = [0.0, 0.0]
        for which in (0, 1, 1, 0):
            began = time.perf_counter()
            (first, second)[which]()
            pair[which] += (time.perf_counter() - began) / 2
        times[0].append(pair[0])
        times[1].append(pair[1])
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as fast the second is, each ratio within its round."""
    return summary([one / other for one, other in zip(slow, fast, strict=True)])


def as_text(values: dict[str, float], digits: int = 2) -> str:
    """`median (least to most)`."""
    return f"{values['median']:.{digits}f} ({values['least']:.{digits}f} to {values['most']:.{digits}f})"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure belongs to, the load at this moment included."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16": has_bf16(),
        "load": os.getloadavg()[0],
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def has_bf16() -> bool:
    """Whether this CPU computes convolutions in bfloat16 (AVX-512 or AMX) and does not imitate it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_name() -> str:
    """The processor's name as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
