"""Conversion of the feed's uint8 batch to the step's float batch."""

import numpy as np
import pytest
import torch

from pipeline.data.feed import RawBatch
from pipeline.training.batches import on_device
from pipeline.training.config import TrainConfig
from pipeline.training.worker import Worker

BATCH = 6


def raw_batch(first: int, last: int) -> RawBatch:
    """Every sample and channel has a different value, the same in LR and HR."""
    values = (np.arange(first, last)[:, None] * 10 + np.arange(3)).astype(np.uint8)[:, None, None, :]
    lr, hr = (np.tile(values, (1, side, side, 1)) for side in (4, 16))
    return RawBatch(lr=lr, hr=hr, corrupt=0)


def channels(world_size: int, shuffle_channels: bool) -> torch.Tensor:
    """(BATCH, 3): the values of all workers' samples, in the order of the global batch."""
    config = TrainConfig(batch_size=BATCH, shuffle_channels=shuffle_channels)
    values = []
    for rank in range(world_size):
        first, last = BATCH * rank // world_size, BATCH * (rank + 1) // world_size
        batch = on_device(raw_batch(first, last), config, Worker(rank=rank, world_size=world_size), step=5)
        assert batch.global_size == BATCH
        assert batch.hr.is_contiguous(memory_format=torch.channels_last)
        for images in (batch.lr, batch.hr):
            assert torch.equal(images, batch.lr[:, :, :1, :1].expand_as(images))
        values.append(batch.lr[:, :, 0, 0])
    return torch.cat(values) * 255


def test_bytes_become_floats_in_0_to_1() -> None:
    expected = torch.arange(BATCH)[:, None] * 10.0 + torch.arange(3)
    torch.testing.assert_close(channels(1, shuffle_channels=False), expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shuffled_channels_are_the_same_in_both_resolutions_and_on_any_workers(world_size: int) -> None:
    alone, shared = channels(1, shuffle_channels=True), channels(world_size, shuffle_channels=True)
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)
    unshuffled = channels(1, shuffle_channels=False)
    torch.testing.assert_close(alone.sort(1).values, unshuffled)
    assert not torch.equal(alone, unshuffled)
