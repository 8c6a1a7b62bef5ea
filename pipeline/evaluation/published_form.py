"""Brings a generator into the one form that the community's programs can open."""

import torch
from torch import Tensor

from pipeline.model import RRDBNet

# chaiNNer, ComfyUI and whoever else reads ESRGAN files through spandrel take these two for granted.
GROWTH_CH = 32
RESIDUAL_SCALE = 0.2


def with_published_growth(generator: RRDBNet) -> RRDBNet:
    """The same function as a network with 32 growth channels: the additional channels are zero everywhere.

    Generators with 32 or more come back as they are.
    """
    growth, features = generator.num_grow_ch, generator.num_feat
    if growth >= GROWTH_CH:
        return generator
    with torch.device("meta"):
        wide = RRDBNet(features, generator.num_block, GROWTH_CH, generator.residual_scale, generator.scale)
    state = {
        name: _widened(name, tensor, wide.state_dict()[name], features, growth)
        for name, tensor in generator.state_dict().items()
    }
    wide.load_state_dict(state, assign=True)
    return wide.eval()


def misread(generator: RRDBNet) -> str | None:
    """Why those programs cannot open the file, or would compute other pictures; None if they do it right."""
    if generator.residual_scale != RESIDUAL_SCALE:
        return (
            f"other programs take residual_scale={RESIDUAL_SCALE}, and this network has {generator.residual_scale}: "
            "their pictures will be wrong; an .onnx file carries its own"
        )
    if generator.num_grow_ch > GROWTH_CH:
        return (
            f"other programs take {GROWTH_CH} growth channels, and this network has {generator.num_grow_ch}"
        )
    return None


def _widened(name: str, tensor: Tensor, like: Tensor, features: int, growth: int) -> Tensor:
    if tensor.shape == like.shape:
        return tensor
    wide = torch.zeros(like.shape, dtype=tensor.dtype)
    if tensor.ndim == 1:
        wide[: tensor.shape[0]] = tensor
        return wide
    outputs = tensor.shape[0]
    wide[:outputs, :features] = tensor[:, :features]
    # A dense convolution reads the block's input, then each earlier convolution's channels.
    for number in range((tensor.shape[1] - features) // growth):
        start, place = features + number * growth, features + number * GROWTH_CH
        wide[:outputs, place : place + growth] = tensor[:, start : start + growth]
    return wide
