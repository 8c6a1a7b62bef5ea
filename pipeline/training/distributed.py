"""Reductions over workers, of which some are differentiable, and gradients averaged over workers.

With them, N workers with a share of the batch each compute the losses and gradients that one worker computes with the
whole batch. Without a process group there is one worker, and nothing is communicated.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def global_means(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Mean of each tensor over all workers' elements, as differentiable scalars; one all-reduce, and one backward.

    Workers may have different numbers of elements, and get the same values. Their gradients, averaged over workers as
    DistributedDataParallel does, are those of the global means.
    """
    if world_size() == 1:
        return tuple(tensor.mean() for tensor in tensors)
    sums = torch.stack([tensor.sum() for tensor in tensors])
    # Filled on the device: a tensor from Python numbers would make the host wait for it.
    counts = torch.stack([torch.full_like(sums[0], tensor.numel()) for tensor in tensors])
    sums, totals = _Sum.apply(torch.stack([sums, counts]))
    return (sums / totals.detach()).unbind()


class _Sum(torch.autograd.Function):
    """The sum over workers. torch's own, `torch.distributed.nn.functional.all_reduce`, is deprecated since 2.14."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # An all-reduce too: every worker's loss depends on every worker's values.
        return _Sum.apply(gradient)


def share_mean(global_batch: int) -> Callable[[Tensor], Tensor]:
    """A mean whose average over workers is the mean over the global batch, without communication.

    For losses that are a mean over samples: each worker is weighted by its number of samples, of `global_batch` in all.
    Returns a function of a tensor whose first dimension is this worker's samples, to a scalar.
    """
    workers = world_size()

    def mean(values: Tensor) -> Tensor:
        # A worker's mean is over its own n samples; n * workers / global_batch turns the average over workers
        # into the sum over all samples divided by their number.
        return values.mean() if workers == 1 else values.mean() * (values.shape[0] * workers / global_batch)

    return mean


def distribute(module: nn.Module, *example: Tensor) -> nn.Module:
    """Wraps `module` in DistributedDataParallel if there are several workers: gradients become means over workers.

    Buffers are not broadcast, because they are equal on all workers: batch norm's statistics are those of the global
    batch, and spectral norm depends on the weights only. Two forward and backward passes on `example` make
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
        outputs = wrapped(*example)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        torch.stack([output.float().mean() for output in outputs]).sum().backward()
    wrapped.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, saved in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(saved)
    return wrapped


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside its wrappers, or `module` itself; a wrapper's attribute is `module`, as in torch's own."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


def gathered(value: str) -> list[str]:
    """The text of every rank, in order; at most 128 bytes of UTF-8.

    torch's all_gather_object would unpickle what the other ranks send.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    own = torch.tensor(list(value.encode().ljust(128, b"\0")), dtype=torch.uint8, device=device)
    texts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(texts, own)
    return [bytes(text.tolist()).rstrip(b"\0").decode() for text in texts]


@torch.no_grad()
def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Sums each tensor over all workers, in place and without gradients."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
