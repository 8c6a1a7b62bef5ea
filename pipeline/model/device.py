"""What torch can do on this machine, and how it computes: precision, autocast, deterministic algorithms."""

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

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


def set_precision(precision: str) -> None:
    """Sets how this process computes float32 convolutions on a GPU; torch's own default for them is TF32.

    Matrix products stay IEEE float32: the networks' two linear layers cost nothing. Do not also use torch's older
    `allow_tf32` flags, nor `torch.backends.cudnn.flags`, which reads them: torch (2.14) raises for a mixture.

    Args:
        precision: fp32: IEEE float32. tf32: inputs are rounded to 10 bits. bf16, fp16: tf32 for those convolutions that
            autocast does not run in 16 bits.
    """
    mode = "ieee" if precision == "fp32" else "tf32"
    cudnn: Any = torch.backends.cudnn  # mypy does not see its operators
    cudnn.conv.fp32_precision = mode
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@contextmanager
def ieee_float32() -> Iterator[None]:
    """A context in which float32 convolutions are IEEE float32 whatever `set_precision` chose."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


def set_deterministic(enabled: bool) -> None:
    """Sets whether every operation of this process computes the same bits each time; called before its first product.

    Without it, cuDNN and some CUDA kernels add in any order. torch raises RuntimeError for an operation without a
    deterministic kernel.
    """
    if enabled:
        # cuBLAS reads it when it starts; torch requires one of two values.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = enabled
    torch.use_deterministic_algorithms(enabled)
    # Otherwise every new tensor would be filled with NaN first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which autocast is off; inputs that it has made bfloat16 must be cast by the caller."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A context whose work on a GPU runs after what is queued before it, and at the same time as what is queued later.

    `join_side_stream` must follow. Until then every tensor that one stream makes and the other uses must stay
    referenced: the memory of a freed one is reused by the stream that made it. On a CPU, nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


def join_side_stream(device: torch.device) -> None:
    """Lets the current stream wait for the work of `side_stream`."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
