"""The project's loop on one worker, on two, and under Ray Train: steps a second, and what starting takes.

    python benchmarks/workers.py --rounds 3

Every worker has one core and the same batch, so two workers do twice the work in a step; the rate of a worker is to
stay. Ways, in turns:

    one      one process
    two      two processes joined by gloo
    apart    two independent processes: what sharing caches and memory costs by itself
    torchrun two processes that torchrun starts
    ray      two workers of Ray Train

The first three are pinned to a core each. Ray Train pins nothing, and neither does torchrun, so these two are compared.

Rates are those of the loop's own records (train/steps_per_s), the median over intervals after the first. The seconds of
starting count from the call to the beginning of the first step; for Ray, with a Ray that runs already.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from turns import as_text, machine, summary

from pipeline.data import prepare
from pipeline.data.feed import Feed
from pipeline.storage import Storage
from pipeline.tracking.spool import Metrics, read_segment, segment_steps
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.worker import Worker

WORKERS = {"one": 1, "two": 2, "apart": 1, "torchrun": 2, "ray": 2}


def make_config(folder: str, name: str, workers: int, options: argparse.Namespace) -> TrainConfig:
    """Stage 1 or 2 alone, without validation; all checkpoints at the end."""
    steps = options.intervals * options.interval
    gan = options.stage == "gan"
    return TrainConfig.model_validate(
        {
            "run_name": name,
            "storage": f"{folder}/runs",
            "workers": workers,
            "batch_size": options.batch * workers,
            "crop_px": 96,
            "data": {
                "source": "sample",
                "root": f"{folder}/data",
                "patch_px": 192,
                "patch_stride_px": 96,
                "feed": "thread",
            },
            "model": {
                "num_block": options.blocks,
                "num_feat": options.features,
                "num_grow_ch": options.features // 2,
                "discriminator_num_feat": options.features,
            },
            "psnr": {"steps": 0 if gan else steps},
            "gan": {"steps": steps if gan else 0, "allow_random_start": True},
            "perceptual": {"weights": "random"},
            "log_every_steps": options.interval,
            "checkpoint_every_steps": 10**6,
            "validate_every_steps": 10**6,
        }
    )


def plain_worker(rank: int, config: TrainConfig, world_size: int, meeting: str, apart: bool) -> None:
    """One process of `one`, `two` or `apart`."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    run = Storage(config.storage) / config.run_name
    if apart:
        run, rank, world_size = run / str(rank), 0, 1
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    train_here(config, run, rank, world_size)


def torchrun_worker(config_file: str) -> None:
    """One process that torchrun has started."""
    config = TrainConfig.model_validate_json(Path(config_file).read_text())
    dist.init_process_group("gloo")
    train_here(config, Storage(config.storage) / config.run_name, dist.get_rank(), dist.get_world_size())


def train_here(config: TrainConfig, run: Storage, rank: int, world_size: int) -> None:
    """The loop in this process, as one worker of a group that is there."""
    torch.set_num_threads(1)
    Path(run.path()).mkdir(parents=True, exist_ok=True)
    try:
        feed = Feed(config.data.root, config.seed, config.batch_size, config.crop_px, rank, world_size)
        train(config, Worker(rank=rank, world_size=world_size), run, feed, [])
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def run_once(way: str, folder: str, number: int, options: argparse.Namespace) -> dict[str, float]:
    """One run of this way: rate, and seconds from the call to the first step."""
    config = make_config(folder, f"{way}-{number}", WORKERS[way], options)
    run = Storage(config.storage) / config.run_name
    began_ms = time.time() * 1000
    if way == "ray":
        from pipeline.training import ray_trainer

        Path(run.path()).mkdir(parents=True)
        ray_trainer.fit(config, run)
    elif way == "torchrun":
        config_file = Path(folder) / f"torchrun-{number}.json"
        config_file.write_text(config.model_dump_json())
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={WORKERS[way]}",
        ]
        subprocess.run([*command, __file__, "--torchrun-worker", str(config_file)], check=True)
    else:
        processes = 1 if way == "one" else 2
        meeting = f"{folder}/meeting-{way}-{number}"
        mp.spawn(plain_worker, (config, WORKERS[way], meeting, way == "apart"), nprocs=processes, join=True)
    total_s = time.time() - began_ms / 1000
    records = metrics_of(run / "0" if way == "apart" else run)
    rates = [record.values["train/steps_per_s"] for record in records]
    start_s = (records[0].time_ms - began_ms) / 1000 - options.interval / rates[0]
    return {"steps_per_s": statistics.median(rates[1:]), "start_s": start_s, "total_s": total_s}


def metrics_of(run: Storage) -> list[Metrics]:
    """The intervals that a run has recorded."""
    records = [record for step in segment_steps(run) for record in read_segment(run, step).records]
    return [
        record for record in records if isinstance(record, Metrics) and "train/steps_per_s" in record.values
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=["psnr", "gan"], default="gan")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="patches of a worker")
    parser.add_argument("--interval", type=int, default=10, help="steps of an interval")
    parser.add_argument("--intervals", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WORKERS), default=list(WORKERS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--torchrun-worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torchrun_worker:
        torchrun_worker(options.torchrun_worker)
        return
    facts = machine()
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(folder, "data", 1, options)
        prepare(config.data, on_ray=False)
        if "ray" in options.ways:
            from pipeline.training import ray_trainer

            began = time.perf_counter()
            ray_trainer.connect(make_config(folder, "connect", 2, options))
            facts["ray_init_s"] = time.perf_counter() - began
        for number in range(options.rounds):
            for way in options.ways[:: 1 if number % 2 == 0 else -1]:
                seen[way].append(run_once(way, folder, number, options))
                print(way, seen[way][-1], flush=True)
    results: dict[str, Any] = {
        way: {key: summary([run[key] for run in runs]) for key in runs[0]} for way, runs in seen.items()
    }

    def ratio(way: str, base: str) -> None:
        if way in seen and base in seen:
            pairs = zip(seen[way], seen[base], strict=True)
            values = summary([one["steps_per_s"] / other["steps_per_s"] for one, other in pairs])
            results[f"{way} to {base}"] = values
            print(f"{way} to {base}, steps/s: {as_text(values)}")

    ratio("two", "one")
    ratio("apart", "one")
    ratio("two", "apart")
    ratio("ray", "torchrun")
    for way, values in results.items():
        if "start_s" in values:
            print(f"{way}: {as_text(values['steps_per_s'])} steps/s, start {as_text(values['start_s'], 1)} s")
    text = json.dumps({"machine": facts, "arguments": sys.argv[1:], "results": results}, indent=2)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
