"""Perceptual distances: networks that compare two batches of images."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.metrics.names import METRICS
from pipeline.metrics.weights import weights_file
from pipeline.model import Lite0Features
from pipeline.model.weights import matching, read_tensors


class Distance(nn.Module):
    """A network that compares images.

    Args:
        network: takes two tensors (N, 3, H, W) in [0, 1] and gives N distances.
        least_px: the smallest side of an image that it can compare.
        options: keyword arguments of the network.
    """

    def __init__(self, network: nn.Module, least_px: int = 1, **options: bool) -> None:
        super().__init__()
        self.network, self.least_px, self.options = network, least_px, options
        self.requires_grad_(False).eval()

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Distances (N,) of float32 RGB (N, 3, H, W) in [0, 1]; 0 for equal images."""
        return self.network(sr, hr, **self.options).reshape(len(sr))


def load_distance(name: str, folder: str | None = None) -> Distance:
    """The network of a perceptual metric, on the CPU; `folder` is that of `weights_file`.

    Raises:
        UserError: its weights file is missing, corrupt, or another network's.
    """
    return _LOADERS[name](folder)


class FeatureDistance(nn.Module):
    """Squared difference of EfficientNet-Lite0's features, as a share of the HR features' squares.

    The mean over the deeper half of the network: those blocks rank blur behind noise of equal MSE, as people do, and
    the shallow ones the other way round (docs/LOG.md).
    """

    layers = ("block4", "block5", "block6", "block7")

    def __init__(self) -> None:
        super().__init__()
        self.features = Lite0Features(self.layers)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Distances (N,) of RGB (N, 3, H, W) in [0, 1]."""
        pairs = zip(self.features(sr).values(), self.features(hr).values(), strict=True)
        shares = [_energy(a - b) / _energy(b).clamp_min(1e-10) for a, b in pairs]
        return torch.stack(shares).mean(0)


def _energy(features: Tensor) -> Tensor:
    return features.square().sum((1, 2, 3))


def _lpips(folder: str | None) -> Distance:
    """LPIPS, AlexNet version 0.1; torchmetrics contains the linear layers."""
    # Imported here: it takes seconds. The public classes load the backbone by unpickling, this one leaves it random.
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    network = _NoTrainLpips(net="alex", pnet_rand=True)
    # torchmetrics cuts torchvision's `features` into slices, whose layers keep their numbers.
    names = {key: f"features.{key.partition('.')[2]}" for key in network.net.state_dict()}
    _load("lpips", "AlexNet", network.net, names, folder)
    # AlexNet's strides leave nothing of a smaller image. `normalize`: images are in [0, 1].
    return Distance(network, least_px=31, normalize=True)


def _dists(folder: str | None) -> Distance:
    """DISTS (Ding et al. 2020); torchmetrics contains its weights of layers."""
    from torchmetrics.functional.image import dists
    from torchvision.models import vgg16

    with torch.device("meta"):
        backbone = vgg16(init_weights=False).features[:30]
    _load("dists", "VGG16", backbone, {key: f"features.{key}" for key in backbone.state_dict()}, folder)
    # torchmetrics' constructor downloads the backbone and loads it by unpickling; the rest of it follows.
    network = dists.DISTSNetwork.__new__(dists.DISTSNetwork)
    nn.Module.__init__(network)
    network.chns = [3, 64, 128, 256, 512, 512]
    network.stage1 = backbone[:4]
    # Each max pooling is replaced.
    for stage, (start, end) in enumerate(((5, 9), (10, 16), (17, 23), (24, 30)), start=2):
        pooling = dists.L2pooling(channels=network.chns[stage - 1])
        network.add_module(f"stage{stage}", nn.Sequential(pooling, *backbone[start:end]))
    for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
        network.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
    path = dists._PATH_WEIGHT_DISTS
    for name, tensor in read_tensors(path, str(path))[0].items():
        network.register_buffer(name, tensor)
    return Distance(network)


def _load(
    name: str, network_name: str, network: nn.Module, names: dict[str, str], folder: str | None
) -> None:
    """Fills `network`; `names` maps its keys to those in the weights file."""
    path = weights_file(name, folder)
    state, _ = read_tensors(path, str(path))
    expected = {names[key]: tensor for key, tensor in network.state_dict().items()}
    found = matching(state, expected, f"{METRICS[name].label}: {path}", f"torchvision's {network_name}")
    network.load_state_dict({key: found[in_file] for key, in_file in names.items()}, assign=True)


_LOADERS: dict[str, Callable[[str | None], Distance]] = {
    "lpips": _lpips,
    "dists": _dists,
    "feature_distance": lambda _: Distance(FeatureDistance()),
}
