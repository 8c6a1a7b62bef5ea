"""What the feed gives, as the step wants it: floats on the device, with their colours shuffled if asked for."""

import torch
from torch import Tensor

from pipeline.data.feed import Batch as RawBatch
from pipeline.data.order import channel_orders, rank_share
from pipeline.training.config import TrainConfig
from pipeline.training.step import Batch
from pipeline.training.worker import Worker


def on_device(raw: RawBatch, config: TrainConfig, worker: Worker, step: int) -> Batch:
    """uint8 travels to the device and becomes float there.

    With `shuffle_channels`, every sample's channels are permuted, in low and high resolution alike, by an order that
    (seed, step, place in the global batch) decide.

    Args:
        raw: this worker's part of a step, uint8.
        config: the run's configuration.
        worker: whose part it is.
        step: the step, from 0.
    """
    device = worker.device
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def ready(images: Tensor) -> Tensor:
        return images.to(device, non_blocking=True).to(torch.float32, memory_format=layout).div_(255)

    lr, hr = ready(raw.lr), ready(raw.hr)
    if config.shuffle_channels:
        first, last = rank_share(config.batch_size, worker.rank, worker.world_size)
        orders = torch.from_numpy(channel_orders(config.seed, config.batch_size, step, first, last))
        orders = orders.to(device, non_blocking=True)
        sample = torch.arange(last - first, device=device)[:, None]
        lr, hr = (images[sample, orders].contiguous(memory_format=layout) for images in (lr, hr))
    return Batch(lr, hr, config.batch_size)
