"""How a GPU computes float32, what stays in float32 under autocast, and deterministic algorithms."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch



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
