"""LPIPS (Zhang et al. 2018), AlexNet version 0.1, computed by torchmetrics.

torchmetrics contains the linear layers. The backbone, torchvision's AlexNet for ImageNet, is read from a file; nothing
is downloaded.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import UserError
from pipeline.imaging import to_tensor
from pipeline.model.features import require_sha256, sha256_start
from pipeline.model.weights import read_tensors

BACKBONE = "alexnet-owt-7be5be79.pth"
# AlexNet's strides leave nothing of a smaller image.
SMALLEST_PX = 31


@dataclass(frozen=True, eq=False)
class Lpips:
    """The distance; 0 for equal images, smaller is closer."""

    network: nn.Module

    @torch.inference_mode()
    def __call__(self, sr: NDArray[np.uint8], hr: NDArray[np.uint8], border: int = 0) -> float:
        """Distance of two uint8 RGB images (H, W, 3) of one size, without `border` pixels at each edge.

        Raises:
            UserError: less than 31 x 31 pixels are left.
        """
        inside = slice(border, sr.shape[0] - border), slice(border, sr.shape[1] - border)
        if min(sr[inside].shape[:2]) < SMALLEST_PX:
            raise UserError(
                f"--lpips needs at least {SMALLEST_PX} x {SMALLEST_PX} pixels without the border of {border}"
            )
        one, other = (to_tensor(np.ascontiguousarray(image[inside])) for image in (sr, hr))
        return float(self.network(one, other, normalize=True))


def load_lpips(folder: str | None = None) -> Lpips:
    """LPIPS with the backbone from a file.

    Args:
        folder: contains the backbone's file; default: torch hub's cache.

    Raises:
        UserError: the file is missing, corrupt or another network's; the message explains how to get it.
    """
    # Imported here: it takes seconds. The public classes load the backbone by unpickling, this one leaves it random.
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    path = (Path(folder) if folder else Path(torch.hub.get_dir()) / "checkpoints") / BACKBONE
    if not path.is_file():
        raise UserError(
            f"LPIPS: {path} does not exist; python -c 'import torchvision; "
            f"torchvision.models.alexnet(weights=\"IMAGENET1K_V1\")' downloads it to torch hub's cache"
        )
    require_sha256(path, sha256_start(BACKBONE), f"LPIPS: {path}")
    state, _ = read_tensors(path, str(path))
    network = _NoTrainLpips(net="alex", pnet_rand=True)
    # torchmetrics cuts torchvision's `features` into slices, whose layers keep their numbers.
    backbone = {key: f"features.{key.partition('.')[2]}" for key in network.net.state_dict()}
    try:
        network.net.load_state_dict({key: state[name] for key, name in backbone.items()})
    except (KeyError, RuntimeError) as error:
        raise UserError(f"LPIPS: {path}: not torchvision's AlexNet ({str(error).splitlines()[0]})") from None
    return Lpips(network)
