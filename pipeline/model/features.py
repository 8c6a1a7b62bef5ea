"""VGG19 features before activation, for the perceptual loss (ESRGAN, sec. 3.3)."""

import hashlib
import os
import shutil
import urllib.request
import uuid
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import UserError
from pipeline.model.weights import read_tensors

# torchvision's VGG19_Weights.IMAGENET1K_V1; the name carries the first digits of the file's sha256.
IMAGENET_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
IMAGENET_SHA256_START = "dcbb9e9d"
DOWNLOAD_TIMEOUT_S = 20.0

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
# Convolutions per level and their width; levels are separated by 2x2 max pooling.
_LEVELS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))
# Layer name to its number in torchvision's `features`, where each convolution is followed by its ReLU.
LAYERS: dict[str, int] = {}
for _level, (_convs, _) in enumerate(_LEVELS):
    for _conv in range(_convs):
        LAYERS[f"conv{_level + 1}_{_conv + 1}"] = 2 * len(LAYERS) + _level


class VGGFeatures(nn.Module):
    """Outputs of VGG19's convolutions, before their ReLU; frozen.

    The network ends at the deepest layer asked for.

    Args:
        layers: names such as "conv5_4", or a mapping from them to weights, of which the names are used.
        weights: "imagenet", "random" (Kaiming normal, decided by `seed`: the same on every worker), or the path of a
            VGG19 state dict with torchvision's names (.pth or .safetensors).
        sha256: expected sha256 of the file, in hexadecimal.
        seed: for "random".

    Raises:
        UserError: an unknown layer, or weights that are missing, damaged, or not VGG19's.
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
        self.layers = tuple(layers)
        check_layers(self.layers)
        deepest = max(LAYERS[layer] for layer in self.layers)
        self.features = nn.ModuleDict()
        channels = 3
        for name, number in LAYERS.items():
            if number <= deepest:
                width = _LEVELS[int(name[4]) - 1][1]
                self.features[str(number)] = nn.Conv2d(channels, width, 3, padding=1, device="meta")
                channels = width
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        path = find_weights(weights, sha256)
        if path is None:
            self._draw(seed)
        else:
            self._load(path)
        self.requires_grad_(False)
        self.eval()

    def _draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.features.to_empty(device="cpu")
        for conv in self.features.values():
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            # Keeps the signal's size through all layers, so that the loss has the size that its weight expects.
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(conv.bias)

    def _load(self, path: Path) -> None:
        where = f"perceptual.weights: {path}"
        state, _ = read_tensors(path, where)
        chosen = {}
        for name, expected in self.state_dict().items():
            tensor = state.get(name)
            if tensor is None or tensor.shape != expected.shape:
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise UserError(
                    f"{where}: not the weights of torchvision's VGG19: {name} {found}, expected {tuple(expected.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise UserError(f"{where}: {name} holds values that are not finite; replace the file")
            # A copy: the file's other tensors, most of its 548 MB, can then be freed.
            chosen[name] = tensor.float().clone()
        self.load_state_dict(chosen, assign=True)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of (N, 3, H, W) RGB images in [0, 1], layer name to (N, channels, height, width).

        They are not normalised by size. H and W must survive the poolings: 16 px for conv5_*.
        """
        x = (images - self.mean) / self.std
        outputs: dict[str, Tensor] = {}
        for name, number in LAYERS.items():
            if str(number) not in self.features:
                break
            if name.endswith("_1") and number > 0:
                x = functional.max_pool2d(x, 2)
            x = self.features[str(number)](x)
            wanted = name in self.layers
            if wanted:
                outputs[name] = x
                if len(outputs) == len(self.layers):
                    break
            # In place it would overwrite the features that were just handed out.
            x = functional.relu(x, inplace=not wanted)
        return outputs


def check_layers(layers: Iterable[str]) -> None:
    """Raises UserError unless every name is a convolution of VGG19 and there is at least one."""
    layers = tuple(layers)
    unknown = [layer for layer in layers if layer not in LAYERS]
    if unknown or not layers:
        raise UserError(f"perceptual.layers: {unknown or 'none'} given; VGG19 has {', '.join(LAYERS)}")


def find_weights(weights: str | os.PathLike[str], sha256: str | None = None) -> Path | None:
    """The absolute path of the checked weights file, downloaded where needed; None for "random".

    It reads the file once, so call it before the cluster starts: what is missing is then one clear line.

    Args:
        weights: as for `VGGFeatures`. "imagenet" is looked for, and put, in torch hub's cache.
        sha256: expected sha256 of the file, in hexadecimal.

    Raises:
        UserError: the file is not there, cannot be had, or is another one.
    """
    if weights == "random":
        return None
    if weights == "imagenet":
        path = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_URL.rpartition("/")[2]
        if not path.exists():
            _download(path)
        expected = sha256 or IMAGENET_SHA256_START
    else:
        path = Path(weights).expanduser().absolute()
        if not path.is_file():
            raise UserError(f"perceptual.weights={weights}: no such file; {_alternatives()}")
        expected = sha256 or ""
    _check_sha256(path, expected, f"perceptual.weights: {path}")
    return path


def _download(path: Path) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(IMAGENET_URL, timeout=DOWNLOAD_TIMEOUT_S) as answer,
            partial.open("wb") as file,
        ):
            shutil.copyfileobj(answer, file, 1 << 20)
        _check_sha256(
            partial, IMAGENET_SHA256_START, f"perceptual.weights=imagenet: what {IMAGENET_URL} gave"
        )
        # Several workers on one machine may download at the same time: whoever comes last replaces an equal file.
        partial.replace(path)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"perceptual.weights=imagenet: {path} is missing and cannot be downloaded "
            f"({str(error) or type(error).__name__}); fetch {IMAGENET_URL} on another machine and put it there, "
            f"or set {_alternatives()}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _check_sha256(path: Path, expected: str, name: str) -> None:
    """Compares the first digits, as many as `expected` has."""
    if not expected:
        return
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error})") from None
    if not found.startswith(expected):
        raise UserError(
            f"{name} has sha256 {found}, expected {expected}; it is damaged or another file, replace it"
        )


def _alternatives() -> str:
    return (
        "perceptual.weights=PATH to a VGG19 state dict (.pth or .safetensors), or perceptual.weights=random "
        "(seeded features, for tests and demonstrations)"
    )
