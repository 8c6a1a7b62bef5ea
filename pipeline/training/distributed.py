"""Differentiable reductions over workers, and batch norm over the global batch.

With them, N workers with a share of the batch each compute the losses and gradients that one worker computes with the
whole batch. Without a process group there is one worker, and nothing is communicated.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


class _SumOverWorkers(torch.autograd.Function):
    """All-reduce (sum) whose backward pass is an all-reduce: every worker's loss depends on every worker's input."""

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


def global_means(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each tensor over all workers' elements, as differentiable scalars; one all-reduce.

    Workers may have different numbers of elements, and get the same values. Their gradients, averaged over workers as
    DistributedDataParallel does, are those of the global means.
    """
    if world_size() == 1:
        return one.mean(), other.mean()
    counts = one.new_tensor([one.numel(), other.numel()])
    sums, totals = _SumOverWorkers.apply(torch.stack([torch.stack([one.sum(), other.sum()]), counts]))
    mean, other_mean = sums / totals.detach()
    return mean, other_mean


def share_mean(global_batch: int) -> Callable[[Tensor], Tensor]:
    """A mean whose average over workers is the mean over the global batch, without communication.

    For losses that are a mean over samples: each worker is weighted by its number of samples.

    Args:
        global_batch: samples in the step over all workers.

    Returns:
        A function of a tensor whose first dimension is this worker's samples, to a scalar.
    """
    workers = world_size()

    def mean(values: Tensor) -> Tensor:
        # A worker's mean is over its own n samples; n * workers / global_batch turns the average over workers
        # into the sum over all samples divided by their number.
        return values.mean() if workers == 1 else values.mean() * (values.shape[0] * workers / global_batch)

    return mean


class _NormalizeGlobally(torch.autograd.Function):
    """Batch norm with the statistics of all workers' values; also returns their mean, biased variance and number.

    A custom function, not autograd, in order to use torch's batch-norm kernels: `var_mean` over channels-last memory
    takes thirty times as long.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance = torch.ops.aten.batch_norm_update_stats(values, None, None, 0.0)
        row = torch.cat([mean, variance, mean.new_tensor([float(values.numel() // len(mean))])])
        slots = torch.zeros(world_size(), row.numel(), dtype=row.dtype, device=row.device)
        slots[rank()] = row
        dist.all_reduce(slots)
        means, variances, counts = slots[:, : len(mean)], slots[:, len(mean) : -1], slots[:, -1:]
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        result = functional.batch_norm(values, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(values, weight, mean, torch.rsqrt(variance + eps), total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, total)
        return result, mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, weight, mean, inverse, total = ctx.saved_tensors
        gradient = gradients[0]
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, values, weight, None, None, mean, inverse, True, ctx.eps, [False, True, True]
        )
        # Every worker's loss depends on every worker's values, through the statistics. DistributedDataParallel reduces
        # the gradients of weight and bias, so those stay local.
        sums = torch.stack([of_weight, of_bias])
        dist.all_reduce(sums)
        # weight * inverse * (gradient - sums[1] / total - normalized * sums[0] / total)
        scale = weight * inverse
        slope = -scale * inverse * sums[0] / total
        offset = -scale * sums[1] / total - slope * mean
        of_values = torch.addcmul(offset[:, None, None], gradient, scale[:, None, None])
        return of_values.addcmul_(values, slope[:, None, None]), of_weight, of_bias, None


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of the global batch.

    torch's SyncBatchNorm requires CUDA; this one requires all_reduce only. Workers may have different numbers of
    samples. Their means and squared deviations are combined (Chan et al. 1979), not raw sums, which would cancel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape and dtype; statistics are in float32 or float64."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        values = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        result, mean, variance, total = _NormalizeGlobally.apply(values, self.weight, self.bias, self.eps)
        self._update_running(mean, variance * (total / (total - 1)))
        return result.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        momentum = 0.1 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def with_global_batch_norm(module: nn.Module) -> nn.Module:
    """Makes every BatchNorm2d in `module` a GlobalBatchNorm2d, in place; returns `module`."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = GlobalBatchNorm2d
    return module


def distribute(module: nn.Module, example: Tensor) -> nn.Module:
    """Wraps `module` in DistributedDataParallel if there are several workers: gradients become means over workers.

    Buffers are not broadcast, because they are equal on all workers: GlobalBatchNorm2d's statistics are those of the
    global batch, and spectral norm depends on the weights only. Two forward and backward passes on `example` make
    DistributedDataParallel rebuild its buckets now. Otherwise the order of summation, and with it the last bit, would
    depend on the number of steps since the last resume.
    """
    if world_size() == 1:
        return module
    buffers = [buffer.clone() for buffer in module.buffers()]
    with warnings.catch_warnings():
        # torch renames the argument; older versions accept this name only.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    for _ in range(2):
        wrapped(example).float().mean().backward()
    wrapped.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, saved in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(saved)
    return wrapped


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside a data-parallel wrapper, or `module` itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@torch.no_grad()
def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Sums each tensor over all workers, in place and without gradients."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
