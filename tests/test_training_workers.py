"""The loop on several workers: stopped after every interval and restarted, it ends with the same bits."""

from pathlib import Path

import pytest
import torch
from gloo import run_workers
from tiny import fields, flags, write_sets
from torch import Tensor

from pipeline.config import load_config
from pipeline.data import prepare
from pipeline.data.feed import Feed
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.config import TrainConfig
from pipeline.training.distributed import gathered
from pipeline.training.loop import train
from pipeline.training.validation_sets import open_sets
from pipeline.training.worker import Worker

pytestmark = pytest.mark.slow
WORKERS = 3


def part_of_a_run(rank: int, world_size: int, config: dict[str, object], run: str, stops: bool) -> int:
    """One worker's way from the newest checkpoint to the end, or to the end of the first interval."""
    settings = TrainConfig.model_validate(config)
    Path(run).mkdir(parents=True, exist_ok=True)
    root = settings.data.root
    feed = Feed(root, settings.seed, settings.batch_size, settings.crop_px, rank, world_size)
    worker = Worker(rank=rank, world_size=world_size, stopping=lambda: stops)
    train(settings, worker, Storage(run), feed, open_sets(settings, []))
    return 0


def tensors_of(run: str) -> dict[str, Tensor]:
    newest = checkpoints.newest(Storage(run))
    assert newest is not None
    return {**newest.tensors, **{f"ema.{name}": value for name, value in newest.ema.items()}}


def test_new_processes_for_every_interval_end_with_the_same_bits(tmp_path: Path) -> None:
    """DistributedDataParallel settles its buckets after the first steps; the order of sums must not depend on when."""
    changes = {"batch_size": 5, "log_every_steps": 3, "checkpoint_every_steps": 6, "validate_every_steps": 6}
    loaded, _ = load_config(flags(fields(write_sets(tmp_path), **changes)), description="", environment={})
    config = loaded.alone()
    prepare(config.data, on_ray=False)
    plain = config.model_dump(mode="json")

    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run_workers(WORKERS, part_of_a_run, plain, whole, False)
    steps: list[int] = []
    while not steps or steps[-1] < 12:
        run_workers(WORKERS, part_of_a_run, plain, parts, True)
        steps.append(checkpoints.listed(Storage(parts))[-1].step)
    assert steps == [3, 6, 9, 12]
    expected, found = tensors_of(whole), tensors_of(parts)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def texts(rank: int, world_size: int) -> list[str]:
    return gathered("é" * rank)


def test_every_worker_gets_the_text_of_each() -> None:
    assert run_workers(3, texts) == [["", "é", "éé"]] * 3
