"""The generator as an ONNX file with 8-bit input and output."""

import copy
import os
import threading
import warnings

import torch
from torch import Tensor, nn

from pipeline.model.rrdbnet import RRDBNet, upscale_8bit

OPSET = 18
# The exporter has global state and raises if two threads use it at once.
_exporter = threading.Lock()


class _EightBit(nn.Module):
    def __init__(self, generator: RRDBNet) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, lr: Tensor) -> Tensor:
        return upscale_8bit(self.generator, lr)


def export_onnx(generator: RRDBNet, path: str | os.PathLike[str]) -> None:
    """Writes one self-contained ONNX file: input `lr` uint8 (N, H, W, 3), output `sr` uint8 (N, H_out, W_out, 3).

    N, H and W are dynamic; H_out = scale * H. At scale 2 and 1, H and W must be multiples of 2 and 4. onnxruntime
    runs it without torch; its results differ by at most one level. Equal generators give equal files.
    """
    module = _EightBit(copy.deepcopy(generator).float().cpu()).eval()
    example = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    axes = {"lr": {0: "N", 1: "H", 2: "W"}, "sr": {0: "N", 1: "H_out", 2: "W_out"}}
    with _exporter, torch.no_grad(), warnings.catch_warnings():
        # The exporter by tracing takes 2 s for 23 blocks; its successor (dynamo=True) about 5 s per block.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(
            module, (example,), os.fspath(path), dynamo=False, opset_version=OPSET,
            input_names=["lr"], output_names=["sr"], dynamic_axes=axes,
        )  # fmt: skip
