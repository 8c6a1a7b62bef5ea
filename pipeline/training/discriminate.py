"""The discriminator on real and fake images together, for the losses of both networks in one backward pass.

The generator's loss must not reach the discriminator's parameters, and the discriminator's loss must not reach the
generator. Hence the fake logits are returned twice, once for each loss.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pipeline.model.device import without_autocast
from pipeline.model.discriminators import NEGATIVE_SLOPE, VGGStyleDiscriminator
from pipeline.training.distributed import rank, world_size

aten = torch.ops.aten


class PairedDiscriminator(nn.Module):
    """A discriminator that is called on a real and a fake batch of the same shape (B, 3, H, W)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Real logits, fake logits, and the same fake logits for the generator's loss.

        Gradients of the first two reach only the parameters, and those of the third only `fake`. The networks are
        in training mode: batch norm normalizes each batch by its own statistics over all workers, and its running
        statistics are updated with the real batch first.
        """
        function = _VGGPair if isinstance(self.module, VGGStyleDiscriminator) else _TwoPasses
        return function.apply(self.module, real, fake, *self.module.parameters())


class _TwoPasses(torch.autograd.Function):
    """Any network without batch norm, by autograd.

    One pass on real and fake images together would also have to propagate the zeros of the generator's gradient at the
    real images, and spectral norm would update its singular vectors once per step instead of twice.
    """

    @staticmethod
    def forward(
        ctx: Any, network: nn.Module, real: Tensor, fake: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = fake.detach().requires_grad_()
            logits = network(real), network(leaf)
        ctx.graph = leaf, logits, parameters
        return logits[0].detach(), logits[1].detach(), logits[1].detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leaf, logits, parameters = ctx.graph
        of_fake = None
        if ctx.needs_input_grad[2]:
            (of_fake,) = torch.autograd.grad(logits[1], leaf, gradients[2], retain_graph=True)
        of_parameters = torch.autograd.grad(logits, parameters, gradients[:2])
        del ctx.graph
        return None, None, of_fake, *of_parameters


class _VGGPair(torch.autograd.Function):
    """The VGG-style discriminator, with real and fake images as one batch of 2B.

    The backward pass carries a batch of 3B gradients: of the discriminator's loss at real and at fake images, and of
    the generator's loss at fake images. A layer is then one convolution instead of two or three, and its statistics
    over all workers are one all-reduce forward and one backward.
    """

    @staticmethod
    def forward(
        ctx: Any, network: VGGStyleDiscriminator, real: Tensor, fake: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = real.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else real.dtype
        layers = []
        # Autocast does not apply to the backward pass of a custom function, so the casts are written out.
        with without_autocast(real.device):
            x = torch.cat([real, fake]).to(dtype)
            for conv, norm in network.layers():
                weight = conv.weight.to(dtype)
                bias = None if conv.bias is None else conv.bias.to(dtype)
                values = functional.conv2d(x, weight, bias, conv.stride, conv.padding)
                result, statistics = (values, None) if norm is None else _normalize(norm, values)
                functional.leaky_relu_(result, NEGATIVE_SLOPE)
                layers.append((conv, weight, x, norm, values, statistics, result))
                x = result
            flat = x.flatten(1).to(network.linear1.weight.dtype)
            hidden = functional.leaky_relu_(network.linear1(flat), NEGATIVE_SLOPE)
            real_logits, fake_logits = network.linear2(hidden).chunk(2)
        ctx.saved = network, layers, flat, hidden
        return real_logits, fake_logits, fake_logits.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        network, layers, flat, hidden = ctx.saved
        del ctx.saved
        both, one = len(flat), len(flat) // 2  # 2B, B
        of: dict[Tensor, Tensor] = {}
        of_fake = None
        g = torch.cat(gradients)
        of[network.linear2.weight], of[network.linear2.bias] = g[:both].T @ hidden, g[:both].sum(0)
        g = _leaky_relu_backward(g @ network.linear2.weight, hidden)
        of[network.linear1.weight], of[network.linear1.bias] = g[:both].T @ flat, g[:both].sum(0)
        g = (g @ network.linear1.weight).unflatten(1, layers[-1][-1].shape[1:])
        while layers:  # frees the activations of each layer
            conv, weight, x, norm, values, statistics, result = layers.pop()
            g = _leaky_relu_backward(g.to(weight.dtype), result)
            if norm is not None:
                g, of[norm.weight], of[norm.bias] = _normalize_backward(norm, g, values, *statistics)
            _, of_weight, of_bias = aten.convolution_backward(
                g[:both], x, weight, [weight.shape[0]], conv.stride, conv.padding, conv.dilation, False, [0, 0], 1,
                [False, True, conv.bias is not None],
            )  # fmt: skip
            of[conv.weight] = of_weight.to(conv.weight.dtype)
            if conv.bias is not None:
                of[conv.bias] = of_bias.to(conv.bias.dtype)
            if layers:
                g = functional.conv_transpose2d(g, weight, None, conv.stride, conv.padding)
            elif ctx.needs_input_grad[2]:
                of_fake = functional.conv_transpose2d(g[-one:], weight, None, conv.stride, conv.padding)
                of_fake = of_fake.to(network.linear1.weight.dtype)
        return None, None, of_fake, *(of[parameter] for parameter in network.parameters())


def _leaky_relu_backward(g: Tensor, result: Tensor) -> Tensor:
    """In place, from a leaky ReLU's result of 2B images; g: (3B, ...)."""
    for part, of in ((g[: len(result)], result), (g[len(result) :], result[len(result) // 2 :])):
        aten.leaky_relu_backward.grad_input(part, of, NEGATIVE_SLOPE, True, grad_input=part)
    return g


def _normalize(norm: nn.BatchNorm2d, values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """Batch norm of each half of `values` by its statistics over all workers; updates the running statistics.

    Returns:
        The result; (means, 1 / standard deviations, number of values over all workers), each with a row per half; the
        number is None if there is one worker.
    """
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(2)
    if world_size() > 1:
        mean, variance, total = _global_statistics(norm, values)
        halves = zip(values.chunk(2), mean, variance, strict=True)
        results = [functional.batch_norm(x, m, v, norm.weight, norm.bias, eps=norm.eps) for x, m, v in halves]
        return torch.cat(results), (mean, torch.rsqrt(variance + norm.eps), total)
    result = torch.empty_like(values)
    mean, inverse = (norm.weight.new_empty(2, len(norm.weight)) for _ in range(2))
    for half, out, m, i in zip(values.chunk(2), result.chunk(2), mean, inverse, strict=True):
        aten.native_batch_norm.out(
            half, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps,
            out=out, save_mean=m, save_invstd=i,
        )  # fmt: skip
    return result, (mean, inverse, None)


def _global_statistics(norm: nn.BatchNorm2d, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of all workers' values, with a row per half; one all-reduce.

    Workers may have different numbers of values. Means and squared deviations are combined (Chan et al. 1979), not
    raw sums, which would cancel. Updates the running statistics.
    """
    # The CPU's kernel returns statistics in the dtype of the values.
    inputs = values if values.is_cuda else values.to(norm.weight.dtype)
    local = [torch.stack(aten.batch_norm_update_stats(half, None, None, 0.0)) for half in inputs.chunk(2)]
    row = torch.stack(local, 1)  # (mean and variance, half, channel)
    count = torch.full_like(row[:1], values[: len(values) // 2, 0].numel())
    slots = row.new_zeros(world_size(), 3, *row.shape[1:])
    slots[rank()] = torch.cat([row, count])
    dist.all_reduce(slots)
    means, variances, counts = slots.unbind(1)
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    variance = ((variances + (means - mean).square()) * counts).sum(0) / total
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    for half_mean, half_unbiased in zip(mean, variance * (total / (total - 1)), strict=True):
        norm.running_mean.lerp_(half_mean, norm.momentum)
        norm.running_var.lerp_(half_unbiased, norm.momentum)
    return mean, variance, total


def _normalize_backward(
    norm: nn.BatchNorm2d, g: Tensor, values: Tensor, mean: Tensor, inverse: Tensor, total: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the values (3B, ...), and of the weight and the bias, on this worker, from the first 2B."""
    real, fake = values.chunk(2)
    rows = [
        aten.native_batch_norm_backward(
            part, half, norm.weight, None, None, mean[i], inverse[i], True, norm.eps, [True, True, True]
        )
        for part, half, i in zip(g.chunk(3), (real, fake, fake), (0, 1, 1), strict=True)
    ]
    parts, of_weight, of_bias = zip(*rows, strict=True)
    g = torch.cat(parts)
    if total is not None:
        # The kernel subtracts means over this worker's values. Every worker's loss depends on every worker's values,
        # through the statistics, so the means over all workers replace them.
        local = torch.stack([*of_weight, *of_bias]).unflatten(0, (2, 3))
        sums = local.clone()
        dist.all_reduce(sums)
        change = local / real[:, 0].numel() - sums / total[0]
        mean, inverse = (torch.cat([each, each[1:]]) for each in (mean, inverse))
        scale = norm.weight * inverse
        slope = scale * inverse * change[0]
        offset = scale * change[1] - slope * mean
        slope, offset = (each[:, None, :, None, None] for each in (slope, offset))
        grouped, values = g.unflatten(0, (3, -1)), values.unflatten(0, (2, -1))
        grouped[:2].addcmul_(values, slope[:2])
        grouped[2:].addcmul_(values[1:], slope[2:])
        grouped.add_(offset)
    return g, of_weight[0] + of_weight[1], of_bias[0] + of_bias[1]
