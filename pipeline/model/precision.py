"""How float32 is computed on a GPU, and what stays in float32 under autocast."""

from contextlib import AbstractContextManager
from typing import Any

import torch

PRECISIONS = ("fp32", "tf32", "bf16")


def set_precision(precision: str) -> None:
    """Sets how this process computes float32 convolutions on a GPU; torch's own default for them is TF32.

    Matrix products stay IEEE float32: the networks' two linear layers cost nothing. Do not also use torch's older
    `allow_tf32` flags, nor `torch.backends.cudnn.flags`, which reads them: torch (2.14) raises for a mixture.

    Args:
        precision: fp32: IEEE float32. tf32: inputs are rounded to 10 bits. bf16: tf32 for those convolutions that
            autocast does not run in bfloat16.
    """
    mode = "ieee" if precision == "fp32" else "tf32"
    cudnn: Any = torch.backends.cudnn  # mypy does not see its operators
    cudnn.conv.fp32_precision = mode
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which autocast is off; inputs that it has made bfloat16 must be cast by the caller."""
    return torch.autocast(device.type, enabled=False)
