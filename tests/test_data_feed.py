"""Batches of the prefetch thread: pixels, order, and the end of the thread."""

import copy
import logging
import pickle
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_patches import pixels, write_patches

from pipeline.data.feed import Feed, RawBatch
from pipeline.data.feed import fetch as fetching
from pipeline.data.feed.fetch import flipped
from pipeline.data.feed.samples import Samples
from pipeline.data.feed.thread_feed import prefetched
from pipeline.data.format import reader as reading
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import UserError

PATCHES, SIDE, SCALE, CROP, BATCH = 13, 32, 4, 16, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_patches(tmp_path_factory.mktemp("patches"), PATCHES, SIDE, SCALE, rows=5)


def feed_of(root: str, rank: int = 0, world_size: int = 1) -> Feed:
    return Feed(root, seed=3, batch_size=BATCH, crop_px=CROP, rank=rank, world_size=world_size)


def collect(feed: Feed, first: int, last: int) -> list[RawBatch]:
    with closing(feed.batches(first, last)) as batches:
        return list(batches)


def equal(one: RawBatch, other: RawBatch) -> bool:
    return (
        np.array_equal(one.lr, other.lr) and np.array_equal(one.hr, other.hr) and one.corrupt == other.corrupt
    )


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_batches_hold_the_crops_and_flips_of_the_samples(root: str) -> None:
    samples = Samples(PATCHES, SIDE, SCALE, 3, BATCH, CROP)
    for step, batch in enumerate(collect(feed_of(root), 0, 5)):
        assert batch.hr.shape == (BATCH, CROP, CROP, 3)
        assert batch.lr.shape == (BATCH, CROP // SCALE, CROP // SCALE, 3)
        assert batch.hr.dtype == batch.lr.dtype == np.uint8
        assert batch.corrupt == 0
        draws = samples.of_step(step)
        for index in range(BATCH):
            y, x = int(draws.y[index]), int(draws.x[index])
            hr, lr = pixels(int(draws.patch[index]), SIDE, SCALE)
            expected = [hr[y : y + CROP, x : x + CROP]]
            y, x = y // SCALE, x // SCALE
            expected.append(lr[y : y + CROP // SCALE, x : x + CROP // SCALE])
            for image, crop in zip((batch.hr[index], batch.lr[index]), expected, strict=True):
                if draws.flips[index] & 1:
                    crop = np.fliplr(crop)
                if draws.flips[index] & 2:
                    crop = np.flipud(crop)
                if draws.flips[index] & 4:
                    crop = crop.swapaxes(0, 1)
                np.testing.assert_array_equal(image, crop)


@pytest.mark.parametrize("flips", range(8))
def test_flips_are_the_same_in_high_and_low_resolution(flips: int) -> None:
    blocks = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = blocks.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    np.testing.assert_array_equal(flipped(large, flips)[::SCALE, ::SCALE], flipped(blocks, flips))


@pytest.mark.parametrize("codec", ["webp"])
def test_a_codec_changes_no_pixel(root: str, codec: str, tmp_path: Path) -> None:
    other = write_patches(tmp_path, PATCHES, SIDE, SCALE, rows=5, codec=codec)
    for one, two in zip(collect(feed_of(root), 0, 4), collect(feed_of(other), 0, 4), strict=True):
        assert equal(one, two)


@pytest.mark.parametrize("codec", ["raw", "webp"])
def test_each_footer_is_read_once(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    footers = []
    real = reading.read_footer
    monkeypatch.setattr(
        reading, "read_footer", lambda content, shard: footers.append(shard.name) or real(content, shard)
    )
    shards = 20
    manifest = load_manifest(write_patches(tmp_path, shards, SIDE, SCALE, rows=1, codec=codec))
    reader = reading.PatchReader(manifest)
    for patch in 2 * list(range(shards)):
        reader.patch(patch)
    reader.close()
    assert len(footers) == shards


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_together_get_the_global_batch_bit_for_bit(root: str, world_size: int) -> None:
    whole = collect(feed_of(root), 0, 6)
    parts = [collect(feed_of(root, rank, world_size), 0, 6) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([part[step].hr for part in parts]), batch.hr)
        assert np.array_equal(np.concatenate([part[step].lr for part in parts]), batch.lr)


def test_resuming_at_any_step_of_an_epoch_continues_the_same_batches(root: str) -> None:
    last = 2 * -(-PATCHES // BATCH)
    whole = collect(feed_of(root), 0, last)
    for first in range(last + 1):
        rest = collect(feed_of(root), first, last)
        assert len(rest) == last - first
        assert all(equal(one, other) for one, other in zip(rest, whole[first:], strict=True))


def test_a_feed_is_pickled_small_even_while_it_runs(root: str) -> None:
    feed = feed_of(root, 1, 2)
    with closing(feed.batches(0, 9)) as batches:
        first = next(batches)
        data = pickle.dumps(feed)
    assert len(data) < 1000
    assert equal(collect(copy.deepcopy(feed), 0, 1)[0], first)


def test_a_corrupt_patch_is_logged_once_counted_and_replaced_by_the_same_one_on_every_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_patches(tmp_path, PATCHES, SIDE, SCALE, rows=5)
    shard = tmp_path / "patches-00001.parquet"
    before = shard.read_bytes()
    at = before.index(pixels(7, SIDE, SCALE)[0].tobytes())
    corrupt = bytearray(before)
    for offset in range(0, 3 * SIDE * SIDE, 3 * SIDE):  # in every row, so that every crop is affected
        corrupt[at + offset] ^= 1
    valid = collect(feed_of(root), 0, 9)
    shard.write_bytes(corrupt)
    fetching._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        whole = collect(feed_of(root), 0, 9)
    assert [record.getMessage().count(f"{shard}, row 2") for record in caplog.records] == [1]

    samples = Samples(PATCHES, SIDE, SCALE, 3, BATCH, CROP)
    for step, (batch, old) in enumerate(zip(whole, valid, strict=True)):
        hit = samples.of_step(step).patch == 7
        assert batch.corrupt >= hit.sum()
        assert (batch.corrupt > 0) == hit.any()
        for index in range(BATCH):
            assert np.array_equal(batch.hr[index], old.hr[index]) != hit[index]
    assert sum(batch.corrupt for batch in whole) > 0
    for world_size in (2, 3):
        parts = [collect(feed_of(root, rank, world_size), 0, 9) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            assert np.array_equal(np.concatenate([part[step].hr for part in parts]), batch.hr)
            assert sum(part[step].corrupt for part in parts) == batch.corrupt


def test_a_missing_data_set_is_a_user_error(tmp_path: Path) -> None:
    root = write_patches(tmp_path, PATCHES, SIDE, SCALE)
    for shard in tmp_path.glob("*.parquet"):
        shard.unlink()
    with pytest.raises(UserError, match="verify"):
        collect(feed_of(root), 0, 1)
    assert not feed_threads()


@pytest.mark.parametrize(("crop_px", "reason"), [(64, "have 32 pixels"), (18, "multiple of data.scale=4")])
def test_a_crop_that_does_not_fit_is_a_user_error(root: str, crop_px: int, reason: str) -> None:
    with pytest.raises(UserError, match=f"crop_px={crop_px}.*{reason}"):
        collect(replace(feed_of(root), crop_px=crop_px), 0, 1)


def test_closing_early_leaves_no_thread(root: str) -> None:
    batches = feed_of(root).batches(0, 10**9)
    next(batches)
    assert len(feed_threads()) == 1
    batches.close()
    assert not feed_threads()


def test_closing_before_the_first_batch_starts_nothing(root: str) -> None:
    feed_of(root).batches(0, 10).close()
    assert not feed_threads()


def test_an_exception_in_the_thread_is_raised_after_the_items_before_it() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            yield 1
            yield 2
            raise ZeroDivisionError
        finally:
            closed.append(True)

    stream = prefetched(items(), 3)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert closed == [True]
    assert not feed_threads()


def test_the_thread_never_prefetches_more_than_the_depth() -> None:
    computed: list[int] = []
    waiting = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            computed.append(number)
            if len(computed) == 4:
                waiting.set()
            yield number

    with closing(prefetched(items(), 3)) as stream:
        assert next(stream) == 0
        assert waiting.wait(10)  # one taken, three waiting
        for number in range(1, 20):
            assert next(stream) == number
            assert len(computed) <= number + 1 + 3
    assert not feed_threads()
