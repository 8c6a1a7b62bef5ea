"""The generator as an ONNX file, with 8-bit or floating-point images."""

import copy
import os
import threading
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import require_package
from pipeline.model.rrdbnet import RRDBNet, upscale_8bit

OPSET = 18
Images = Literal["uint8", "fp32", "fp16"]
# The exporter has global state and raises if two threads use it at once.
_exporter = threading.Lock()


class _Upscaler(nn.Module):
    def __init__(self, generator: RRDBNet, images: Images) -> None:
        super().__init__()
        self.generator, self.images = generator, images

    def forward(self, lr: Tensor) -> Tensor:
        return upscale_8bit(self.generator, lr) if self.images == "uint8" else self.generator(lr).clamp(0, 1)


def export_onnx(generator: RRDBNet, path: str | os.PathLike[str], images: Images = "uint8") -> None:
    """Writes one self-contained ONNX file with one input, `lr`, and one output, `sr`.

    N, H and W are dynamic; H_out = scale * H. At scale 2 and 1, H and W must be multiples of 2 and 4. onnxruntime
    runs it without torch; its results differ by at most one level of 255. Equal generators give equal files.

    Args:
        generator: the network.
        path: the file.
        images: uint8: (N, H, W, 3) to (N, H_out, W_out, 3), weights in float32. fp32, fp16: (N, 3, H, W) to
            (N, 3, H_out, W_out), RGB in [0, 1], as chaiNNer and most other programs expect it; images and weights in
            float32 or float16.

    Raises:
        UserError: the package onnx is not installed.
    """
    require_package("onnx", "an ONNX file", "export another format")
    network = copy.deepcopy(generator).float().cpu().eval()
    if images == "uint8":
        example, (height, width) = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), (1, 2)
    else:
        dtype = torch.float16 if images == "fp16" else torch.float32
        network.to(dtype)
        example, (height, width) = torch.zeros(1, 3, 8, 8, dtype=dtype), (2, 3)
    axes = {"lr": {0: "N", height: "H", width: "W"}, "sr": {0: "N", height: "H_out", width: "W_out"}}
    with _exporter, torch.no_grad(), warnings.catch_warnings():
        # The exporter by tracing takes 2 s for 23 blocks; its successor (dynamo=True) about 5 s per block.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(
            _Upscaler(network, images).eval(), (example,), os.fspath(path), dynamo=False, opset_version=OPSET,
            input_names=["lr"], output_names=["sr"], dynamic_axes=axes,
        )  # fmt: skip
