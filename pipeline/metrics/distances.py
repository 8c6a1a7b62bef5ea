"""Perceptual distances: networks that compare two batches of images."""

from collections.abc import Callable

from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.metrics.names import METRICS
from pipeline.metrics.weights import weights_file
from pipeline.model.weights import read_tensors


class Distance(nn.Module):
    """A network that compares images.

    Args:
        network: takes two tensors (N, 3, H, W) in [0, 1] and gives N distances.
        least_px: the smallest side of an image that it can compare.
    """

    def __init__(self, network: nn.Module, least_px: int = 1) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.least_px = least_px

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Distances (N,) of float32 RGB (N, 3, H, W) in [0, 1]; 0 for equal images."""
        return self.network(sr, hr).reshape(len(sr))


def load_distance(name: str, folder: str | None = None) -> Distance:
    """The network of a perceptual metric, on the CPU.

    Args:
        name: the metric.
        folder: contains its weights file; default: see `weights_file`.

    Raises:
        UserError: the file is missing, corrupt, or another network's.
    """
    return _LOADERS[name](folder)


class _Lpips(nn.Module):
    """torchmetrics' LPIPS for images in [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        return self.network(sr, hr, normalize=True)


def _lpips(folder: str | None) -> Distance:
    """LPIPS (Zhang et al. 2018), AlexNet version 0.1; torchmetrics contains the linear layers."""
    # Imported here: it takes seconds. The public classes load the backbone by unpickling, this one leaves it random.
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    network = _NoTrainLpips(net="alex", pnet_rand=True)
    # torchmetrics cuts torchvision's `features` into slices, whose layers keep their numbers.
    names = {key: f"features.{key.partition('.')[2]}" for key in network.net.state_dict()}
    _load("lpips", "AlexNet", network.net, names, folder)
    # AlexNet's strides leave nothing of a smaller image.
    return Distance(_Lpips(network), least_px=31)


def _load(name: str, backbone: str, network: nn.Module, names: dict[str, str], folder: str | None) -> None:
    """Fills `network`; `names` maps its keys to those in the weights file."""
    path = weights_file(name, folder)
    state, _ = read_tensors(path, str(path))
    try:
        network.load_state_dict({key: state[in_file] for key, in_file in names.items()})
    except (KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{METRICS[name].label}: {path}: not torchvision's {backbone} ({reason})") from None


_LOADERS: dict[str, Callable[[str | None], Distance]] = {"lpips": _lpips}
