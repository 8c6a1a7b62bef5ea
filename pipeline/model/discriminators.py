"""The two discriminators: ESRGAN's VGG-style classifier and Real-ESRGAN's U-Net."""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.spectral_norm import SpectralNorm

from pipeline.model.device import without_autocast

NEGATIVE_SLOPE = 0.2


class VGGStyleDiscriminator(nn.Module):
    """A VGG-style classifier with batch norm on every convolution but the first (SRGAN, fig. 4; BasicSR).

    State-dict names and shapes are BasicSR's, whose published weights are for 128 px.

    Raises:
        ValueError: `input_px` is not a positive multiple of 32; five strided convolutions halve it.
    """

    multiple_of: ClassVar[int] = 32
    """Height and width must be a multiple of this many pixels."""

    @staticmethod
    def least_batch(input_px: int) -> int:
        """Fewest images of `input_px` pixels in a training batch: batch norm needs two values per channel."""
        return 2 if input_px == VGGStyleDiscriminator.multiple_of else 1

    def __init__(self, input_px: int = 128, num_feat: int = 64) -> None:
        super().__init__()
        if input_px < self.multiple_of or input_px % self.multiple_of:
            raise ValueError(
                f"input_px={input_px}: the VGG-style discriminator needs a positive multiple of {self.multiple_of}"
            )
        self.input_px = input_px
        self.num_feat = num_feat
        channels = 3
        for level, width in enumerate(_widths(num_feat)):
            # Batch norm has a bias, so the convolutions before it have none.
            self.add_module(f"conv{level}_0", nn.Conv2d(channels, width, 3, padding=1, bias=level == 0))
            if level > 0:
                self.add_module(f"bn{level}_0", nn.BatchNorm2d(width))
            self.add_module(f"conv{level}_1", nn.Conv2d(width, width, 4, stride=2, padding=1, bias=False))
            self.add_module(f"bn{level}_1", nn.BatchNorm2d(width))
            channels = width
        self.linear1 = nn.Linear(channels * (input_px // self.multiple_of) ** 2, 100)
        self.linear2 = nn.Linear(100, 1)

    def layers(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
        """Convolutions and their batch norm, in order; a leaky ReLU follows each."""
        for level in range(len(_widths(self.num_feat))):
            for part in (0, 1):
                yield getattr(self, f"conv{level}_{part}"), getattr(self, f"bn{level}_{part}", None)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, input_px, input_px) RGB in [0, 1] to logits (N, 1) in the weights' dtype, also under autocast.

        Raises:
            ValueError: another height or width than input_px.
        """
        if x.shape[-2:] != (self.input_px, self.input_px):
            height, width = x.shape[-2:]
            raise ValueError(
                f"{height} x {width} pixels: this discriminator was built for input_px={self.input_px}"
            )
        for conv, norm in self.layers():
            x = conv(x) if norm is None else norm(conv(x))
            x = functional.leaky_relu(x, NEGATIVE_SLOPE, inplace=True)
        # In bfloat16, logits near 8 are multiples of 1/32.
        with without_autocast(x.device):
            x = x.flatten(1).to(self.linear1.weight.dtype)
            x = functional.leaky_relu(self.linear1(x), NEGATIVE_SLOPE, inplace=True)
            return self.linear2(x)


def _widths(num_feat: int) -> tuple[int, ...]:
    return (num_feat, 2 * num_feat, 4 * num_feat, 8 * num_feat, 8 * num_feat)


class _SpectralNorm(SpectralNorm):
    """torch's spectral norm without autocast, which on CUDA runs the power iteration in bfloat16."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        with without_autocast(getattr(module, f"{self.name}_orig").device):
            return super().compute_weight(module, do_power_iteration)


def _spectral_norm(conv: nn.Conv2d) -> nn.Conv2d:
    nn.utils.spectral_norm(conv)
    for hook in conv._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            hook.__class__ = _SpectralNorm
    return conv


class UNetDiscriminator(nn.Module):
    """A U-Net with spectral norm and one logit per pixel (Real-ESRGAN, sec. 3.2).

    State-dict names are those of Real-ESRGAN's published weights.
    """

    multiple_of: ClassVar[int] = 8
    """Height and width must be a multiple of this many pixels."""

    @staticmethod
    def least_batch(input_px: int) -> int:
        """Fewest images of `input_px` pixels in a training batch; without batch norm, 1."""
        return 1

    def __init__(self, num_feat: int = 64) -> None:
        super().__init__()
        self.num_feat = num_feat
        norm = _spectral_norm
        self.conv0 = nn.Conv2d(3, num_feat, 3, padding=1)
        self.conv1 = norm(nn.Conv2d(num_feat, num_feat * 2, 4, 2, 1, bias=False))
        self.conv2 = norm(nn.Conv2d(num_feat * 2, num_feat * 4, 4, 2, 1, bias=False))
        self.conv3 = norm(nn.Conv2d(num_feat * 4, num_feat * 8, 4, 2, 1, bias=False))
        self.conv4 = norm(nn.Conv2d(num_feat * 8, num_feat * 4, 3, 1, 1, bias=False))
        self.conv5 = norm(nn.Conv2d(num_feat * 4, num_feat * 2, 3, 1, 1, bias=False))
        self.conv6 = norm(nn.Conv2d(num_feat * 2, num_feat, 3, 1, 1, bias=False))
        self.conv7 = norm(nn.Conv2d(num_feat, num_feat, 3, 1, 1, bias=False))
        self.conv8 = norm(nn.Conv2d(num_feat, num_feat, 3, 1, 1, bias=False))
        self.conv9 = nn.Conv2d(num_feat, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) RGB in [0, 1] to logits (N, 1, H, W) in the weights' dtype, also under autocast.

        Raises:
            ValueError: H or W is not a multiple of 8; three strided convolutions halve them.
        """
        height, width = x.shape[-2:]
        if height % self.multiple_of or width % self.multiple_of:
            raise ValueError(
                f"{height} x {width} pixels: the U-Net discriminator needs multiples of {self.multiple_of}"
            )

        def down(conv: nn.Module, features: Tensor) -> Tensor:
            return functional.leaky_relu(conv(features), NEGATIVE_SLOPE, inplace=True)

        def up(conv: nn.Module, features: Tensor) -> Tensor:
            larger = functional.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
            return functional.leaky_relu(conv(larger), NEGATIVE_SLOPE, inplace=True)

        full = down(self.conv0, x)
        half = down(self.conv1, full)
        quarter = down(self.conv2, half)
        eighth = down(self.conv3, quarter)
        features = up(self.conv4, eighth) + quarter
        features = up(self.conv5, features) + half
        features = up(self.conv6, features) + full
        features = down(self.conv8, down(self.conv7, features))
        with without_autocast(x.device):
            return self.conv9(features.to(self.conv9.weight.dtype))


Discriminator = VGGStyleDiscriminator | UNetDiscriminator
# By their names in the field `model.discriminator`.
DISCRIMINATORS: dict[str, type[Discriminator]] = {"vgg": VGGStyleDiscriminator, "unet": UNetDiscriminator}
