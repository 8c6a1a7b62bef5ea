"""The generator: residual-in-residual dense blocks (ESRGAN, sec. 3.1).

A registered model carries this file and runs without the project, so it imports torch and the standard library only.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

NEGATIVE_SLOPE = 0.2
# Published x2 and x1 generators fold pixels into channels first and then run the x4 network (Real-ESRGAN, sec. 3.3).
UNSHUFFLE = {4: 1, 2: 2, 1: 4}


class _ConvOfConcat(torch.autograd.Function):
    """A 3x3 convolution of concatenated inputs that saves the inputs and not their concatenation.

    The dense block's activations are then kept once each instead of once per convolution that reads them; the
    backward pass concatenates again and computes the same bits.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor, *inputs: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight, *inputs)
        return functional.conv2d(torch.cat(inputs, 1), weight, bias, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        weight, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, torch.cat(inputs, 1), weight, [weight.shape[0]],
            [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [any(needs[2:]), needs[0], needs[1]],
        )  # fmt: skip
        if grad_input is None:
            return grad_weight, grad_bias, *(None for _ in inputs)
        return grad_weight, grad_bias, *grad_input.split([tensor.shape[1] for tensor in inputs], 1)


def _conv_of_concat(conv: nn.Conv2d, inputs: list[Tensor]) -> Tensor:
    if len(inputs) == 1 or not torch.is_grad_enabled():
        return conv(torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0])
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    # Autocast does not apply to the backward pass of a custom function, so the casts precede the function.
    device_type = inputs[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        weight, bias, inputs = weight.to(dtype), bias.to(dtype), [tensor.to(dtype) for tensor in inputs]
    return _ConvOfConcat.apply(weight, bias, *inputs)


class DenseBlock(nn.Module):
    """Five densely connected convolutions and a scaled residual; the fifth convolution has no activation."""

    def __init__(self, num_feat: int, num_grow_ch: int, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.conv1 = nn.Conv2d(num_feat, num_grow_ch, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat + num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv3 = nn.Conv2d(num_feat + 2 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv4 = nn.Conv2d(num_feat + 3 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv5 = nn.Conv2d(num_feat + 4 * num_grow_ch, num_feat, 3, padding=1)
        for conv in self.children():
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            if conv.weight.is_meta:
                continue  # Initializing has no effect on the meta device, and takes 1 ms for each layer.
            nn.init.kaiming_normal_(conv.weight)
            # A small start keeps deep residual networks trainable without batch norm (ESRGAN, sec. 3.1).
            with torch.no_grad():
                conv.weight.mul_(0.1)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        inputs = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            inputs.append(functional.leaky_relu(_conv_of_concat(conv, inputs), NEGATIVE_SLOPE, inplace=True))
        return torch.add(x, _conv_of_concat(self.conv5, inputs), alpha=self.residual_scale)


class RRDB(nn.Module):
    """Three dense blocks and a scaled residual."""

    def __init__(self, num_feat: int, num_grow_ch: int, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.rdb1 = DenseBlock(num_feat, num_grow_ch, residual_scale)
        self.rdb2 = DenseBlock(num_feat, num_grow_ch, residual_scale)
        self.rdb3 = DenseBlock(num_feat, num_grow_ch, residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same shape."""
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=self.residual_scale)


class RRDBNet(nn.Module):
    """ESRGAN's generator.

    State-dict names are those of published weights. The arguments are attributes, too.

    Raises:
        ValueError: a scale other than 4, 2 or 1.
    """

    def __init__(
        self,
        num_feat: int = 64,
        num_block: int = 23,
        num_grow_ch: int = 32,
        residual_scale: float = 0.2,
        scale: int = 4,
    ) -> None:
        super().__init__()
        if scale not in UNSHUFFLE:
            raise ValueError(f"scale={scale}: RRDBNet exists for scale 4, 2 and 1")
        self.num_feat = num_feat
        self.num_block = num_block
        self.num_grow_ch = num_grow_ch
        self.residual_scale = residual_scale
        self.scale = scale
        self.unshuffle = UNSHUFFLE[scale]
        # Computes `body` by other means, such as the kernels in trunk_kernels.py; returns None where it cannot.
        self.trunk: Callable[[Tensor, nn.Sequential, float], Tensor | None] | None = None
        self.conv_first = nn.Conv2d(3 * self.unshuffle**2, num_feat, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(num_feat, num_grow_ch, residual_scale) for _ in range(num_block)))
        self.conv_body = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv_up1 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv_up2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv_hr = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv_last = nn.Conv2d(num_feat, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Low resolution to high resolution.

        Args:
            x: (N, 3, H, W) RGB in [0, 1]; at scale 2 and 1, H and W are multiples of 2 and 4.

        Returns:
            (N, 3, H * scale, W * scale), about [0, 1], not clamped, in the weights' dtype, also under autocast.
        """
        if self.unshuffle > 1:
            x = functional.pixel_unshuffle(x, self.unshuffle)
        features = self.conv_first(x)
        trunk = None if self.trunk is None else self.trunk(features, self.body, self.residual_scale)
        features = features + self.conv_body(self.body(features) if trunk is None else trunk)
        for conv in (self.conv_up1, self.conv_up2):
            # Autocast would copy pixels in float32.
            with torch.autocast(features.device.type, enabled=False):
                features = functional.interpolate(features, scale_factor=2, mode="nearest")
            features = conv(features)
            features = functional.leaky_relu(features, NEGATIVE_SLOPE, inplace=True)
        features = functional.leaky_relu(self.conv_hr(features), NEGATIVE_SLOPE, inplace=True)
        if not torch.is_autocast_enabled(x.device.type):
            return self.conv_last(features)
        # In bfloat16, pixels near 1 are multiples of 1/256.
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_last(features.to(self.conv_last.weight.dtype))


def upscale_8bit(generator: nn.Module, lr: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) RGB to uint8 (N, H * scale, W * scale, 3): clamped, rounded half to even.

    At scale 2 and 1, H and W must be multiples of 2 and 4.
    """
    sr = generator(lr.permute(0, 3, 1, 2).float() / 255)
    return sr.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
