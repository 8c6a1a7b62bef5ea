"""Opens the feed, moves its batches to the device and converts them to float; optional channel shuffling."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.feed import Feed, RawBatch
from pipeline.data.feed.samples import channel_orders, rank_share
from pipeline.training.config import TrainConfig
from pipeline.training.step import Batch
from pipeline.training.worker import Worker


def feed_of(config: TrainConfig, worker: Worker) -> Feed:
    """This rank's share of every step."""
    root, local_cache = config.data.root, config.data.local_cache
    return Feed(
        root, config.seed, config.batch_size, config.crop_px, worker.rank, worker.world_size, local_cache
    )


def on_device(raw: RawBatch, config: TrainConfig, worker: Worker, step: int) -> Batch:
    """Transfers uint8 to the device, then converts to float32 in [0, 1] there.

    With `shuffle_channels`, the channels of every sample are permuted, the same way in LR and HR; the permutation is a
    function of seed, step and the sample's index in the global batch.

    Args:
        raw: this rank's part of a step, uint8 (B, H, W, 3) and (B, H * scale, W * scale, 3).
        step: from 0.
    """
    device = worker.device
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def ready(pixels: NDArray[np.uint8]) -> Tensor:
        images = torch.from_numpy(pixels).to(device, non_blocking=True).permute(0, 3, 1, 2)
        return images.to(torch.float32, memory_format=layout).div_(255)

    lr, hr = ready(raw.lr), ready(raw.hr)
    if config.shuffle_channels:
        first, last = rank_share(config.batch_size, worker.rank, worker.world_size)
        orders = torch.from_numpy(channel_orders(config.seed, config.batch_size, step, first, last))
        orders = orders.to(device, non_blocking=True)
        sample = torch.arange(last - first, device=device)[:, None]
        lr, hr = (images[sample, orders].contiguous(memory_format=layout) for images in (lr, hr))
    return Batch(lr, hr, config.batch_size)
