"""What torch can do on this machine: whether it can use the GPU, and why not; whether bfloat16 is fast."""

import torch

from pipeline.errors import UserError

# The oldest NVIDIA driver for torch's wheels of a CUDA version (CUDA Toolkit release notes, table 3).
_DRIVERS = {"12": "525", "13": "580"}


def require_gpu(needed_for: str, instead: str) -> None:
    """Starts CUDA in this process, which takes memory on the GPU.

    Args:
        needed_for: the field and its value that need a GPU.
        instead: how to do without one, as a command.

    Raises:
        UserError: torch cannot use a GPU here; contains torch's own reason and the driver that it needs.
    """
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{needed_for}: torch cannot use a GPU here ({reason}); {_remedy()}, or {instead}"
        ) from None


def emulates_bf16(device: torch.device) -> bool:
    """Whether convolutions in bfloat16 are slower than in float32: CPUs before AVX-512, GPUs before Ampere."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False  # unknown


def _remedy() -> str:
    cuda = torch.version.cuda
    if cuda is None:
        return f"torch {torch.__version__} is built for CPUs: install a build for CUDA (https://pytorch.org)"
    driver = _DRIVERS.get(cuda.split(".")[0], "for it")
    return (
        f"torch {torch.__version__} (CUDA {cuda}) needs driver {driver} or newer: update the driver, or install a "
        "build for an older CUDA (pip install torch --index-url https://download.pytorch.org/whl/cu126)"
    )
