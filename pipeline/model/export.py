"""The generator as an ONNX file that takes and gives 8-bit images."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.model.rrdbnet import RRDBNet


class _OnImages(nn.Module):
    def __init__(self, generator: RRDBNet) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, images: Tensor) -> Tensor:
        lr = images.permute(0, 3, 1, 2).to(torch.float32) / 255
        sr = self.generator(lr).clamp(0, 1) * 255
        return sr.round().to(torch.uint8).permute(0, 2, 3, 1)


def export_onnx(generator: RRDBNet, path: str | os.PathLike[str]) -> None:
    """Writes one self-contained ONNX file: input `lr` uint8 (N, H, W, 3), output `sr` uint8 (N, 4H, 4W, 3).

    N, H and W are free. At scale 2 and 1, H and W must be multiples of 2 and 4. The generator stays as it was.
    """
    wrapped = _OnImages(generator).eval()
    step = generator.unshuffle
    example = torch.zeros(
        2, 8 * step, 6 * step, 3, dtype=torch.uint8, device=next(generator.parameters()).device
    )
    free = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    torch.onnx.export(
        wrapped, (example,), str(Path(path)), dynamo=True, external_data=False, verbose=False,
        input_names=["lr"], output_names=["sr"], dynamic_shapes={"images": free},
    )  # fmt: skip
