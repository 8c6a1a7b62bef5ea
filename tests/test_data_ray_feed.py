"""Batches through Ray Data are those of the prefetch thread."""

import hashlib
import time
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import ray.data
from tiny_patches import write_patches

from pipeline.data.feed import Feed, RawBatch, ray_feed
from pipeline.data.feed.ray_feed import MAX_TASKS, RayFeed, StepSource, choose, with_transport
from pipeline.errors import UserError

FIELDS: dict[str, Any] = {"seed": 3, "batch_size": 6, "crop_px": 16}


def digest(batch: RawBatch) -> str:
    parts = [images.tobytes() for images in (batch.lr, batch.hr)]
    return hashlib.sha256(b"".join(parts)).hexdigest() + f" {batch.corrupt}"


def digests(feed: Feed, first: int, last: int) -> list[str]:
    with closing(feed.batches(first, last)) as batches:
        return [digest(batch) for batch in batches]


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ({"a": 2.0}, ["a", "a"], "thread"),
        ({"a": 6.0}, ["a", "a"], "thread"),
        ({"a": 8.0}, ["a", "a"], "ray"),
        ({"a": 4.0}, ["a"], "ray"),
        ({"a": 2.0, "b": 2.0}, ["a", "a"], "ray"),
        ({"a": 2.0, "b": 1.0}, ["a", "a"], "thread"),
        ({"a": 2.0, "b": 2.0}, ["a", "b"], "thread"),
    ],
)
def test_auto_selects_ray_only_with_spare_cpus(
    nodes: dict[str, float], workers: list[str], expected: str
) -> None:
    transport, reason = choose(nodes, workers, len(workers), 1.0)
    assert transport == expected
    assert "CPUs" in reason


def test_auto_selects_the_thread_if_workers_occupy_all_cores() -> None:
    assert choose({"a": 8.0}, ["a", "a"], 2, 4.0)[0] == "thread"


def test_the_choice_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(3):
        feed = Feed("data", **FIELDS, rank=rank, world_size=3)
        assert with_transport(feed, "thread", ["a"] * 3, 1.0) == feed
    assert capsys.readouterr().out == "data.feed: thread (as configured)\n"


@pytest.mark.parametrize(
    ("codec", "expected"),
    [("raw", "thread (raw patches on a local disk)"), ("webp", "ray (8 spare CPUs per worker)")],
)
def test_auto_uses_ray_data_only_where_patches_are_decoded_or_downloaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    codec: str,
    expected: str,
) -> None:
    node = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 9.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    root = write_patches(tmp_path, 3, codec=codec)
    feed = with_transport(Feed(root, **FIELDS), "auto", ["a"], 1.0)
    assert isinstance(feed, RayFeed) == expected.startswith("ray")
    assert capsys.readouterr().out == f"data.feed: {expected}\n"


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 400_000])
def test_read_tasks_cover_every_step_once_and_stay_few(tmp_path: Path, steps: int) -> None:
    feed = Feed(write_patches(tmp_path, 3), **FIELDS)
    source = StepSource(feed, 5, 5 + steps)
    spans = [task.read_fn.args[2] for task in source.get_read_tasks(-1)]
    assert len(spans) <= MAX_TASKS
    assert spans[0].start == 5
    assert spans[-1].stop == 5 + steps
    assert all(one.stop == two.start and len(two) for one, two in pairwise(spans))


@pytest.mark.ray
def test_ray_and_thread_give_the_same_batches_from_any_step(ray_cluster: str, tmp_path: Path) -> None:
    root = write_patches(tmp_path, 13, rows=5)
    for first in (0, 11):
        for worker in ({"rank": 0, "world_size": 1}, {"rank": 1, "world_size": 2}):
            expected = digests(Feed(root, **FIELDS, **worker), first, 30)
            assert digests(RayFeed(root, **FIELDS, **worker), first, 30) == expected


@pytest.mark.ray
def test_a_user_error_in_a_ray_data_task_is_one_line(ray_cluster: str, tmp_path: Path) -> None:
    root = write_patches(tmp_path, 5)
    for shard in tmp_path.glob("*.parquet"):
        shard.unlink()
    with pytest.raises(UserError, match="verify") as caught:
        digests(RayFeed(root, **FIELDS), 0, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.ray
def test_training_may_pause_longer_than_ray_data_waits_for_progress(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation consumes no batches; by default Ray Data ends the run after half an hour of it."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 1.0)
    monkeypatch.setattr(ray_feed, "OBJECT_STORE_MEMORY", 2**20)
    feed = RayFeed(write_patches(tmp_path, 13, rows=5), **FIELDS)
    with closing(feed.batches(0, 30_000)) as batches:
        next(batches)
        time.sleep(4)  # the pause itself is tested
        assert sum(1 for _ in islice(batches, 2000)) == 2000
