"""VGG19 features before activation, for the perceptual loss (ESRGAN, sec. 3.3)."""

import hashlib
import os
import socket
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.model.weights import matching, read_tensors

DOWNLOAD_TIMEOUT_S = 20.0
PROVIDED = frozenset({"imagenet", "efficientnet_lite0", "random"})
"""Values of perceptual.weights that are not the path of a file."""

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
# Layer name to its index in torchvision's `features`: convolutions per level, each followed by its ReLU; one max
# pooling between levels.
LAYERS: dict[str, int] = {}
for _level, _convs in enumerate((2, 2, 4, 4, 4)):
    for _conv in range(_convs):
        LAYERS[f"conv{_level + 1}_{_conv + 1}"] = 2 * len(LAYERS) + _level


class VGGFeatures(nn.Module):
    """Outputs of the convolutions of torchvision's VGG19, before their ReLU; frozen.

    The network ends at the deepest of the given layers.

    Args:
        layers: names such as "conv5_4", or a mapping from them to weights, of which the names are used.
        weights: "imagenet", "random" (Kaiming normal, a function of `seed` only: equal on every worker), or the path of
            a VGG19 state dict with torchvision's names (.pth or .safetensors).
        sha256: expected sha256 of the file, in hexadecimal.
        seed: for "random".

    Raises:
        UserError: an unknown layer, or weights that are missing, corrupt, or not VGG19's.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        layers: Mapping[str, float] | Iterable[str],
        weights: str | os.PathLike[str] = "imagenet",
        sha256: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        names = tuple(layers)
        unknown = [name for name in names if name not in LAYERS]
        if unknown or not names:
            raise UserError(f"perceptual.layers: {unknown or 'none'} given; VGG19 has {', '.join(LAYERS)}")
        # Imported here: it takes a second, which commands that need no features save.
        from torchvision.models import vgg19

        self.taps = {LAYERS[name]: name for name in sorted(names, key=LAYERS.__getitem__)}
        with torch.device("meta"):
            self.features = vgg19(init_weights=False).features[: max(self.taps) + 1]
        for index in self.taps:
            if index + 1 < len(self.features):
                # torchvision's ReLUs are in place and would overwrite the features that are returned.
                self.features[index + 1].inplace = False
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        path = find_weights(weights, sha256)
        if path is None:
            self._initialize(seed)
        else:
            self._load(path)
        self.requires_grad_(False)
        self.eval()

    def _initialize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.features.to_empty(device="cpu")
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                assert layer.bias is not None
                # Keeps the activations' variance through all layers, so that the loss has the scale that its weight
                # is chosen for.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(layer.bias)

    def _load(self, path: Path) -> None:
        name = f"perceptual.weights: {path}"
        state, _ = read_tensors(path, name)
        chosen = matching(state, self.state_dict(), name, "torchvision's VGG19")
        self.load_state_dict(chosen, assign=True)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of (N, 3, H, W) RGB images in [0, 1], layer name to (N, channels, height, width).

        H and W must not vanish in the poolings: at least 16 px for conv5_*.
        """
        x = (images - self.mean) / self.std
        outputs: dict[str, Tensor] = {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                outputs[self.taps[index]] = x
        return outputs


def find_weights(weights: str | os.PathLike[str], sha256: str | None = None) -> Path | None:
    """The absolute path of the verified weights file, downloaded if needed; None for "random".

    Args:
        weights: as for `VGGFeatures`. "imagenet" is torchvision's file in torch hub's cache.
        sha256: expected sha256 of the file, in hexadecimal; default for "imagenet": the digits in the file's name.

    Raises:
        UserError: the file does not exist, cannot be downloaded, or has another sha256.
    """
    if weights == "random":
        return None
    if weights == "imagenet":
        url = imagenet_url()
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not path.exists():
            _download(url, path)
        sha256 = sha256 or sha256_start(path.name)
    else:
        path = Path(weights).expanduser().absolute()
        if not path.is_file():
            raise UserError(f"perceptual.weights={weights}: no such file; {_ALTERNATIVES}")
    if sha256:
        require_sha256(path, sha256, f"perceptual.weights: {path}")
    return path


def imagenet_url() -> str:
    """Address of torchvision's VGG19 weights for ImageNet."""
    from torchvision.models import VGG19_Weights

    return VGG19_Weights.IMAGENET1K_V1.url


def sha256_start(file_name: str) -> str:
    """The first digits of a file's sha256, which torchvision puts into its name: `vgg19-dcbb9e9d.pth`."""
    return Path(file_name).stem.rpartition("-")[2]


def _download(url: str, path: Path) -> None:
    timeout = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub sets no timeout: a server that stops answering would block the start forever.
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
        # It writes to a temporary file that is renamed, so several workers on one machine may do this at once.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_start(path.name), progress=False)
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(
            f"perceptual.weights=imagenet: {path} is missing and cannot be downloaded "
            f"({str(error) or type(error).__name__}); fetch {url} on another machine and put it there, "
            f"or set {_ALTERNATIVES}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def file_sha256(path: Path) -> str:
    """A file's sha256, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_sha256(path: Path, expected: str, name: str) -> None:
    """Raises UserError unless the file's sha256 starts with `expected`; `name` is the file's name in the message."""
    try:
        actual = file_sha256(path)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error})") from None
    if not actual.startswith(expected):
        raise UserError(
            f"{name} has sha256 {actual}, expected {expected}; it is corrupt or another file, replace it"
        )


_ALTERNATIVES = (
    "perceptual.weights=PATH to a VGG19 state dict (.pth or .safetensors), or perceptual.weights=random "
    "(seeded features, for tests and demonstrations)"
)
