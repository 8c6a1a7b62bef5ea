"""Sums over workers that gradients flow through, and batch norm over the global batch.

With them, N workers with a share of a batch each compute the losses and gradients that one worker computes with the
whole batch. Without a process group every function is the identity on one worker.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


class _SumOverWorkers(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce: every worker's loss depends on every worker's input."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_workers(value: Tensor) -> Tensor:
    """Sum of `value` over all workers, differentiable."""
    return _SumOverWorkers.apply(value) if world_size() > 1 else value


def global_mean(values: Tensor) -> Tensor:
    """Mean over all workers' elements, differentiable, whatever the shares.

    Every worker gets the same value. Its gradient, averaged over workers as DistributedDataParallel does, is the
    gradient of the one global mean.
    """
    if world_size() == 1:
        return values.mean()
    total = sum_over_workers(torch.stack([values.sum(), values.new_tensor(float(values.numel()))]))
    return total[0] / total[1].detach()


def share_mean(global_batch: int) -> Callable[[Tensor], Tensor]:
    """A mean whose average over workers is the mean over the global batch; it needs no communication.

    For losses that are a mean over samples: a worker with more samples counts for more.

    Args:
        global_batch: samples in the step over all workers. The function takes tensors with this worker's samples in
            the first dimension.
    """
    workers = world_size()

    def mean(values: Tensor) -> Tensor:
        # A worker's mean is over its own n samples; n * workers / global_batch turns the average over workers
        # into the sum over all samples divided by their number.
        return values.mean() if workers == 1 else values.mean() * (values.shape[0] * workers / global_batch)

    return mean


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of the global batch.

    torch's SyncBatchNorm needs CUDA. This one runs wherever all_reduce does, lets shares of the batch differ in size,
    and combines the workers' means and squared deviations (Chan et al. 1979) rather than raw sums, which would cancel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and dtype; statistics are in float32 or better."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        values = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        count = values.numel() // values.shape[1]
        variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        row = torch.cat([mean, variance, mean.new_tensor([float(count)])])
        slots = torch.zeros(world_size(), row.numel(), dtype=row.dtype, device=row.device)
        slots = sum_over_workers(slots.index_add(0, torch.tensor([rank()], device=row.device), row[None]))
        means, variances, counts = slots[:, : len(mean)], slots[:, len(mean) : -1], slots[:, -1:].detach()
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        self._update_running(mean.detach(), variance.detach() * (total / (total - 1)))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], values, scale[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        momentum = 0.1 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def with_global_batch_norm(module: nn.Module) -> nn.Module:
    """Makes every BatchNorm2d in `module` take its statistics from the global batch; weights stay the same objects."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = GlobalBatchNorm2d
    return module


def distribute(module: nn.Module, example: Tensor) -> nn.Module:
    """Wraps `module` for data-parallel training: its gradients become averages over workers.

    Buffers are not broadcast: with GlobalBatchNorm2d they are equal on all workers anyway. One pass forward and
    backward on `example` makes DistributedDataParallel settle the order of its buckets now, so that the order of
    summation, and with it the last bit, does not depend on how long ago training was resumed.
    """
    if world_size() == 1:
        return module
    buffers = [buffer.clone() for buffer in module.buffers()]
    with warnings.catch_warnings():
        # Newer versions of torch rename the argument; older ones know only this name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    for _ in range(2):
        wrapped(example).float().mean().backward()
    wrapped.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, saved in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(saved)
    return wrapped


def bare(module: nn.Module) -> nn.Module:
    """The module inside a data-parallel wrapper, or `module` itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@torch.no_grad()
def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Sums each tensor over all workers, outside of autograd."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
