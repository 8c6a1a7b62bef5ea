"""The weights of the generator's trunk in the form that its GPU kernels read."""

from typing import Any

import torch
from torch import Tensor, nn


class PackedTrunk:
    """The trunk's weights in the kernels' layout and dtype, for all dense blocks.

    Args:
        weights: of the five convolutions of the dense blocks: (blocks, cout, cin, 3, 3) each, float32.
        biases: (blocks, cout) each.
        dtype: bfloat16 or float16.
        backward: whether to pack for the backward pass, too.
    """

    def __init__(
        self, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...], dtype: torch.dtype, *, backward: bool
    ) -> None:
        half = [weight.detach().to(dtype) for weight in weights]
        self.feat, self.growth = weights[4].shape[1], weights[0].shape[1]
        self.pitch = self.feat + 4 * self.growth
        self.biases = [bias.detach().float() for bias in biases]
        # (blocks, cout, cin, 3, 3) to (blocks, 3, 3, cin, cout)
        self.forward = [weight.permute(0, 3, 4, 2, 1).contiguous() for weight in half]
        self.backward: list[Tensor] = []
        if backward:
            # For the gradient of segment j of the buffer: taps flipped, inputs and outputs exchanged, and the
            # convolutions that read the segment one after the other, in the order of the gradients' buffer.
            flipped = [weight.flip(3, 4).permute(0, 3, 4, 1, 2) for weight in half]
            for segment in range(5):
                channels = self.segment(segment)
                readers = range(4, segment - 1, -1)
                self.backward.append(torch.cat([flipped[conv][..., channels] for conv in readers], 3))

    def segment(self, index: int) -> slice:
        """Channels in a block's buffer of its input (0) or of the output of convolution `index` (1 to 4)."""
        if index == 0:
            return slice(0, self.feat)
        return slice(self.feat + (index - 1) * self.growth, self.feat + index * self.growth)


def stacked(body: nn.Sequential) -> tuple[Tensor, ...]:
    """The trunk's parameters by convolution, stacked over the dense blocks: five weights, five biases."""
    blocks: list[Any] = [block for rrdb in body for block in (rrdb.rdb1, rrdb.rdb2, rrdb.rdb3)]
    convs = [f"conv{number}" for number in range(1, 6)]
    weights = (torch.stack([getattr(block, conv).weight for block in blocks]) for conv in convs)
    biases = (torch.stack([getattr(block, conv).bias for block in blocks]) for conv in convs)
    return *weights, *biases
