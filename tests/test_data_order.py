"""The samples of a step are a function of (seed, step, data set), and of nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.data.feed.samples import Draws, Samples, channel_orders, rank_share

# 23 patches and batches of 6: every epoch ends in the middle of a batch.
SAMPLES = Samples(patches=23, patch_px=32, scale=4, seed=7, batch_size=6, crop_px=16)


def rows(draws: Draws) -> list[tuple[int, ...]]:
    return list(
        zip(draws.patch.tolist(), draws.y.tolist(), draws.x.tolist(), draws.flips.tolist(), strict=True)
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shares_of_all_ranks_make_up_the_global_batch(world_size: int) -> None:
    for step in range(12):
        shares = [
            rows(SAMPLES.of_step(step, *rank_share(SAMPLES.batch_size, rank, world_size)))
            for rank in range(world_size)
        ]
        assert sum(shares, []) == rows(SAMPLES.of_step(step))  # noqa: RUF017 - four short lists


@pytest.mark.parametrize("patches", [1, 2, 3, 23, 64, 1000])
def test_every_epoch_is_another_permutation_of_all_patches(patches: int) -> None:
    samples = replace(SAMPLES, patches=patches, batch_size=1)
    epochs = [
        [int(samples.of_step(step).patch[0]) for step in range(epoch * patches, (epoch + 1) * patches)]
        for epoch in range(3)
    ]
    for order in epochs:
        assert sorted(order) == list(range(patches))
    if patches >= 23:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != list(range(patches))


def test_batches_run_across_the_end_of_an_epoch() -> None:
    order = np.concatenate([SAMPLES.of_step(step).patch for step in range(23)])  # six epochs, 138 samples
    for epoch in range(6):
        assert sorted(order[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


def test_crops_are_aligned_inside_the_patch_and_all_places_are_reached() -> None:
    draws = replace(SAMPLES, batch_size=4000).of_step(3)
    for offsets in (draws.y, draws.x):
        assert set(offsets.tolist()) == set(range(0, 32 - 16 + 1, 4))
    places = set(zip(draws.y.tolist(), draws.x.tolist(), strict=True))
    assert len(places) == 25


def test_all_eight_flips_come_equally_often() -> None:
    flips = replace(SAMPLES, batch_size=8000).of_step(0).flips
    counts = np.bincount(flips, minlength=8)
    assert len(counts) == 8
    assert counts.min() > 850
    assert counts.max() < 1150


def test_a_crop_as_large_as_the_patch_stays_at_its_corner() -> None:
    draws = replace(SAMPLES, crop_px=32).of_step(5)
    assert not draws.y.any()
    assert not draws.x.any()


def test_another_seed_gives_another_order() -> None:
    assert rows(SAMPLES.of_step(0)) != rows(replace(SAMPLES, seed=8).of_step(0))


def test_a_late_step_of_a_large_data_set_costs_no_more_than_the_first() -> None:
    samples = replace(SAMPLES, patches=1_000_003, batch_size=16)
    draws = samples.of_step(1_400_000)
    assert len(draws.patch) == 16
    assert (draws.patch < 1_000_003).all()
    assert rows(draws) == rows(samples.of_step(1_400_000))


def test_channel_orders_are_permutations_by_seed_step_and_position() -> None:
    whole = channel_orders(7, 6, 11, 0, 6)
    parts = [channel_orders(7, 6, 11, *rank_share(6, rank, 4)) for rank in range(4)]
    assert np.array_equal(np.concatenate(parts), whole)
    many = channel_orders(7, 600, 0, 0, 600)
    assert np.array_equal(np.sort(many, axis=1), np.tile(np.arange(3), (600, 1)))
    counts = np.unique(many, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert counts.min() > 70
    assert not np.array_equal(channel_orders(8, 600, 0, 0, 600), many)
