"""LPIPS (Zhang et al. 2018), AlexNet version 0.1: a learned perceptual distance, where its weights are at hand.

Two files: torchvision's AlexNet for ImageNet, and the five linear layers that the paper's authors published
(`alex.pth`; the package `lpips` brings it). Neither can be put into this project; nothing is downloaded.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.errors import UserError
from pipeline.imaging import to_tensor
from pipeline.model.weights import read_tensors

BACKBONE = "alexnet-owt-7be5be79.pth"
LINEAR = "alex.pth"
# torchvision names the file by the first digits of its sha256.
_BACKBONE_SHA256 = "7be5be79"
_CONVS = (
    (0, 4, 2),
    (3, 1, 2),
    (6, 1, 1),
    (8, 1, 1),
    (10, 1, 1),
)  # index in AlexNet's features, stride, padding


@dataclass(frozen=True, eq=False)
class Lpips:
    """The distance; 0 is equal, smaller is nearer."""

    convs: list[tuple[Tensor, Tensor]]
    linear: list[Tensor]

    @torch.inference_mode()
    def __call__(self, sr: NDArray[np.uint8], hr: NDArray[np.uint8], border: int = 0) -> float:
        """Distance of two uint8 RGB images of one size, without a border of so many pixels."""
        inside = slice(border, sr.shape[0] - border), slice(border, sr.shape[1] - border)
        pair = torch.cat([to_tensor(np.ascontiguousarray(image[inside])) for image in (sr, hr)])
        distance = torch.zeros(())
        for features, weight in zip(self._features(pair), self.linear, strict=True):
            unit = features / (features.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
            distance = distance + functional.conv2d((unit[:1] - unit[1:]).pow(2), weight).mean()
        return float(distance)

    def _features(self, images: Tensor) -> list[Tensor]:
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        x = (images * 2 - 1 - shift) / scale
        features = []
        for number, ((weight, bias), (_, stride, padding)) in enumerate(zip(self.convs, _CONVS, strict=True)):
            if number in (1, 2):
                x = functional.max_pool2d(x, 3, 2)
            x = functional.relu(functional.conv2d(x, weight, bias, stride, padding))
            features.append(x)
        return features


def load_lpips(folder: str | None = None, *, check: bool = True) -> Lpips:
    """LPIPS from files.

    Args:
        folder: holds both files; without one, AlexNet from torch's cache and the linear layers from the package
            `lpips`.
        check: the backbone's sha256 must be torchvision's.

    Raises:
        UserError: a file is missing, damaged or another network's; the line says how to get it.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    backbone = _found([Path(folder)] if folder else [cache], BACKBONE)
    linear = _found([Path(folder)] if folder else [cache, *_package_folder()], LINEAR)
    content = backbone.read_bytes()
    if check and not hashlib.sha256(content).hexdigest().startswith(_BACKBONE_SHA256):
        raise UserError(
            f"{backbone}: not torchvision's AlexNet (its sha256 does not begin with {_BACKBONE_SHA256})"
        )
    alexnet, _ = read_tensors(content, str(backbone))
    layers, _ = read_tensors(linear.read_bytes(), str(linear))
    try:
        convs = [
            (alexnet[f"features.{i}.weight"].float(), alexnet[f"features.{i}.bias"].float())
            for i, *_ in _CONVS
        ]
        return Lpips(convs, [layers[f"lin{number}.model.1.weight"].float() for number in range(len(_CONVS))])
    except KeyError as error:
        raise UserError(f"{backbone}, {linear}: {error.args[0]} is missing; not the files of LPIPS") from None


def _found(folders: list[Path], name: str) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    hint = {
        BACKBONE: "python -c 'import torchvision; torchvision.models.alexnet(weights=\"IMAGENET1K_V1\")' fetches it",
        LINEAR: "pip install --no-deps lpips brings it",
    }[name]
    raise UserError(f"LPIPS: {name} is not in {', '.join(map(str, folders))}; {hint}")


def _package_folder() -> list[Path]:
    spec = importlib.util.find_spec("lpips")
    return [Path(spec.origin).parent / "weights" / "v0.1"] if spec and spec.origin else []
