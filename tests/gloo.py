"""Runs a function on several gloo processes."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked  # noqa: F401 - what the server of these processes imports
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(
    rank: int, world_size: int, meeting: str, work: Callable[..., Any], folder: str, args: tuple[Any, ...]
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    try:
        torch.save(work(rank, world_size, *args), Path(folder) / f"{rank}.pt")
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def run_workers(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(rank, world_size, *args)` on every worker; what each returned (tensors and plain values), by rank."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        arguments = (world_size, meeting, work, folder, args)
        mp.start_processes(_enter, arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
