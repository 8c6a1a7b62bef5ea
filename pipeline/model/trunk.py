"""Chooses between the generator's plain trunk and the GPU kernels for it."""

import importlib.util

import torch
from torch import Tensor, nn

from pipeline.model.rrdbnet import RRDBNet

# Tensor cores for bfloat16 exist from this compute capability on.
_LEAST_CAPABILITY = (8, 0)
# The kernels compute offsets in 32 bits.
_MOST_ELEMENTS = 2**31


def use_kernels(generator: RRDBNet) -> None:
    """Lets `generator` compute its trunk by the kernels wherever they apply; elsewhere it stays as it is.

    They apply to bfloat16 and float16 inputs (also under autocast) on GPUs of compute capability 8.0 and more with
    Triton, for numbers of features and growth channels that are powers of two from 16 on.
    """
    sizes = (generator.num_feat, generator.num_grow_ch)
    if all(size >= 16 and size & (size - 1) == 0 for size in sizes) and importlib.util.find_spec("triton"):
        generator.trunk = _trunk


def _trunk(x: Tensor, body: nn.Sequential, scale: float) -> Tensor | None:
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(x.device) < _LEAST_CAPABILITY:
        return None
    channels = (
        body.get_submodule("0.rdb1.conv5").get_parameter("weight").shape[1]
    )  # of a dense block's buffer
    if x.shape[0] * x.shape[2] * x.shape[3] * channels >= _MOST_ELEMENTS:
        return None
    # Imported here: Triton exists on GPU machines only, and takes a second to load.
    from pipeline.model.trunk_kernels import trunk

    return trunk(x, body, scale)
