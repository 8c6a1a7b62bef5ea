"""Chooses between the generator's plain trunk and the GPU kernels for it."""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor, nn

from pipeline.model.rrdbnet import RRDBNet

# Tensor cores for bfloat16 exist from this compute capability on.
_LEAST_CAPABILITY = (8, 0)
# More need more shared memory than many GPUs have.
_MOST_CHANNELS = 64
# The kernels compute offsets in 32 bits.
_MOST_ELEMENTS = 2**31


def use_kernels(generator: RRDBNet) -> None:
    """Lets `generator` compute its trunk by the kernels wherever they apply; elsewhere it stays as it is.

    They apply to bfloat16 and float16 inputs (also under autocast) on GPUs of compute capability 8.0 and more with
    Triton, for 16, 32 or 64 features and growth channels.
    """
    sizes = (generator.num_feat, generator.num_grow_ch)
    fitting = all(16 <= size <= _MOST_CHANNELS and size & (size - 1) == 0 for size in sizes)
    if fitting and importlib.util.find_spec("triton"):
        generator.trunk = _trunk


def _trunk(x: Tensor, body: nn.Sequential, scale: float) -> Tensor | None:
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    if not _usable(x.device):
        return None
    of_buffer = body.get_submodule("0.rdb1.conv5").get_parameter("weight").shape[1]
    if x.shape[0] * x.shape[2] * x.shape[3] * of_buffer >= _MOST_ELEMENTS:
        return None
    # Imported here: Triton exists on GPU machines only, and takes a second to load.
    from pipeline.model.trunk_kernels import trunk

    return trunk(x, body, scale)


@functools.cache
def _usable(device: torch.device) -> bool:
    """Whether this process can run the kernels on a GPU; warns if Triton cannot be started."""
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018 - compiles Triton's launcher, with the machine's C compiler
    except Exception as error:  # noqa: BLE001 - many kinds, and the plain trunk computes the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"the GPU kernels for the generator's trunk are not used, and training is slower: Triton does not start "
            f"({reason}); it needs a C compiler and Python's headers (gcc, python3-dev)",
            stacklevel=2,
        )
        return False
    return True
