"""The files with the backbone weights of the perceptual metrics; nothing is downloaded."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from pipeline.errors import UserError, require_package
from pipeline.metrics.names import METRICS
from pipeline.model.features import require_sha256, sha256_start
from pipeline.model.lite0 import lite0_file

# torchvision's weights for ImageNet; each name ends with the first digits of the file's sha256.
BACKBONES = {"lpips": "alexnet-owt-7be5be79.pth", "dists": "vgg16-397923af.pth"}
ADDRESS = "https://download.pytorch.org/models/"


def weights_file(name: str, folder: str | None = None) -> Path:
    """The verified weights file of a perceptual metric: in `folder`, by default torch hub's cache.

    That of feature_distance is in an installed package.

    Raises:
        UserError: the file does not exist or is corrupt; the message explains how to get it.
    """
    if name == "feature_distance":
        return lite0_file()
    file = BACKBONES[name]
    path = (Path(folder).expanduser() if folder else Path(torch.hub.get_dir()) / "checkpoints") / file
    label = METRICS[name].label
    require_package("torchmetrics", name, "choose other metrics")
    if not path.is_file():
        raise UserError(f"{label}: {path} does not exist; download {ADDRESS}{file} and put it there")
    require_sha256(path, sha256_start(file), f"{label}: {path}")
    return path


def require(names: Iterable[str], folder: str | None = None) -> None:
    """Raises UserError for the first of the metrics whose weights are missing or corrupt."""
    for name in names:
        if METRICS[name].perceptual:
            weights_file(name, folder)


def unavailable(names: Sequence[str], folder: str | None = None) -> dict[str, str]:
    """Those of the metrics whose weights are missing or corrupt, each with the reason."""
    reasons = {}
    for name in names:
        try:
            require([name], folder)
        except UserError as error:
            reasons[name] = str(error)
    return reasons
