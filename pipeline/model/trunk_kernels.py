"""The generator's trunk on a GPU in half precision: Triton convolutions over one buffer for each dense block.

cuDNN reaches a tenth to a third of an H100's peak on the dense block's convolutions, because few output channels are
computed from inputs that must be concatenated first. Here the block's input and the outputs of its first four
convolutions are adjacent in one NHWC buffer, of which every convolution reads a prefix and writes the next
channels. The backward pass has the same form: with a buffer of gradients [d5 | d4 | d3 | d2 | d1] of the convolutions'
outputs, each gradient is a convolution of a prefix of that buffer.

Same mathematics as `RRDBNet.body` under autocast; products are in bfloat16 or float16, sums, bias, activation and
residuals in float32. `RRDBNet.body` is the reference (tests/test_model_trunk_kernels.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from pipeline.model.device import join_side_stream, side_stream
from pipeline.model.rrdbnet import NEGATIVE_SLOPE
from pipeline.model.trunk_weights import PackedTrunk, stacked

# What happens to a convolution's sums before they are stored.
_DENSE, _RESIDUAL, _MASK, _INPUT = range(4)


@triton.jit
def _conv3x3(  # type: ignore[no-untyped-def]
    x, weight, bias, out, other, extra, second, height, width, pixels, stride,
    x_pitch, out_pitch, out_offset, other_pitch, other_offset, extra_pitch, second_pitch, scale, outer, second_scale,
    CIN: tl.constexpr, COUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EPILOGUE: tl.constexpr,
    HAS_EXTRA: tl.constexpr, HAS_SECOND: tl.constexpr, HALO: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """A 3x3 convolution with zero padding of channels [0, CIN) of `x`; one program computes BLOCK_M consecutive pixels.

    The products of a row of pixels with the three horizontal taps are summed over vertical taps and channels
    separately, and shifted by a pixel at the end: the input is read three times instead of nine.
    """
    local = tl.arange(0, BLOCK_M)
    m = tl.program_id(0) * stride + local - HALO
    inside = (m >= 0) & (m < pixels)
    column = m % width
    row = (m // width) % height
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, COUT)
    left = tl.zeros((BLOCK_M, COUT), dtype=tl.float32)
    middle = tl.zeros((BLOCK_M, COUT), dtype=tl.float32)
    right = tl.zeros((BLOCK_M, COUT), dtype=tl.float32)
    chunks: tl.constexpr = CIN // BLOCK_K
    for i in range(0, 3 * chunks):
        dy = i // chunks - 1
        first = (i % chunks) * BLOCK_K
        ok = inside & (row + dy >= 0) & (row + dy < height)
        a = tl.load(
            x + (m + dy * width)[:, None] * x_pitch + (first + k)[None, :], mask=ok[:, None], other=0.0
        )
        taps = weight + ((dy + 1) * 3 * CIN + first + k)[:, None] * COUT + n[None, :]
        left = tl.dot(a, tl.load(taps), left)
        middle = tl.dot(a, tl.load(taps + CIN * COUT), middle)
        right = tl.dot(a, tl.load(taps + 2 * CIN * COUT), right)
    before = tl.broadcast_to(tl.maximum(local - 1, 0)[:, None], (BLOCK_M, COUT))
    after = tl.broadcast_to(tl.minimum(local + 1, BLOCK_M - 1)[:, None], (BLOCK_M, COUT))
    sums = middle
    sums += tl.where((column > 0)[:, None], tl.gather(left, before, 0), 0.0)
    sums += tl.where((column < width - 1)[:, None], tl.gather(right, after, 0), 0.0)

    stored = inside & (local >= HALO) & (local < BLOCK_M - HALO)
    mask = stored[:, None]
    if EPILOGUE == 0:  # a dense convolution: leaky ReLU
        sums += tl.load(bias + n)[None, :]
        sums = tl.where(sums > 0, sums, SLOPE * sums)
    if EPILOGUE == 1:  # the fifth convolution: the block's residual, and the RRDB's at its end
        sums += tl.load(bias + n)[None, :]
        block_input = tl.load(x + m[:, None] * x_pitch + n[None, :], mask=mask, other=0.0).to(tl.float32)
        sums = block_input + scale * sums
    if EPILOGUE == 2:  # backward: the leaky ReLU's gradient, by the sign of its output
        sign = tl.load(other + m[:, None] * other_pitch + other_offset + n[None, :], mask=mask, other=0.0)
        sums = tl.where(sign > 0, sums, SLOPE * sums)
    if EPILOGUE == 3:  # backward: the gradient at the block's input
        top = tl.load(other + m[:, None] * other_pitch + n[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += scale * top
    if HAS_EXTRA:
        sums = outer * sums + tl.load(extra + m[:, None] * extra_pitch + n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out + m[:, None] * out_pitch + out_offset + n[None, :], sums.to(out.dtype.element_ty), mask=mask)
    if HAS_SECOND:
        copy = (second_scale * sums).to(second.dtype.element_ty)
        tl.store(second + m[:, None] * second_pitch + n[None, :], copy, mask=mask)


def _launch(
    x: Tensor, weight: Tensor, out: Tensor, offset: int, epilogue: int, shape: tuple[int, int, int], *,
    bias: Tensor | None = None, other: Tensor | None = None, other_offset: int = 0, scale: float = 1.0,
    extra: Tensor | None = None, outer: float = 1.0, second: Tensor | None = None, second_scale: float = 1.0,
) -> None:  # fmt: skip
    """`x`, `out`, `other`: (pixels, channels) buffers; `weight`: (3, 3, CIN, COUT); `shape`: images, height, width."""
    images, height, width = shape
    pixels = images * height * width
    cin, cout = weight.shape[2:]
    block_m, block_k, warps, stages = _tiles(cin, cout)
    halo = 0 if block_m % width == 0 else 1
    stride = block_m - 2 * halo
    none = x  # an unused pointer
    _conv3x3[(triton.cdiv(pixels, stride),)](
        x, weight, none if bias is None else bias, out, none if other is None else other,
        none if extra is None else extra, none if second is None else second, height, width, pixels, stride,
        x.stride(0), out.stride(0), offset, 0 if other is None else other.stride(0), other_offset,
        0 if extra is None else extra.stride(0),
        0 if second is None else second.stride(0), scale, outer, second_scale,
        CIN=cin, COUT=cout, BLOCK_M=block_m, BLOCK_K=block_k, EPILOGUE=epilogue, HAS_EXTRA=extra is not None,
        HAS_SECOND=second is not None, HALO=halo, SLOPE=NEGATIVE_SLOPE, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _tiles(cin: int, cout: int) -> tuple[int, int, int, int]:
    """Pixels and channels of a tile, warps and pipeline stages."""
    # Measured on an H100 for 64 features and 32 growth channels (docs/LOG.md).
    if cin < 128 and cout <= 32:
        return 128, 32 if cin % 32 == 0 else 16, 4, 3
    return (64, 64, 4, 3) if cin % 64 == 0 else (64, 32 if cin % 32 == 0 else 16, 4, 4)


def run_trunk(x: Tensor, packed: PackedTrunk, scale: float, buffers: Tensor) -> Tensor:
    """The trunk's forward pass.

    Args:
        x: (N, feat, H, W), channels-last, in the packed weights' dtype.
        packed: the weights.
        scale: residual scaling.
        buffers: (blocks or 4, N * H * W, pitch); the blocks' activations. With 4, they are overwritten in turns.

    Returns:
        (N, feat, H, W), channels-last.
    """
    images, feat, height, width = x.shape
    shape = (images, height, width)
    blocks = len(packed.forward[0])
    flat = x.permute(0, 2, 3, 1).reshape(-1, feat)
    result = torch.empty_like(flat)
    buffers[0][:, :feat] = flat
    for block in range(blocks):
        buffer = buffers[block % len(buffers)]
        for conv in range(4):
            _launch(
                buffer, packed.forward[conv][block], buffer, feat + conv * packed.growth, _DENSE, shape,
                bias=packed.biases[conv][block],
            )  # fmt: skip
        is_last = block + 1 == blocks
        out = result if is_last else buffers[(block + 1) % len(buffers)]
        # The end of an RRDB adds the RRDB's input, which is in the buffer of its first dense block.
        rrdb_input = buffers[(block - 2) % len(buffers)] if block % 3 == 2 else None
        _launch(
            buffer, packed.forward[4][block], out, 0, _RESIDUAL, shape,
            bias=packed.biases[4][block], scale=scale, extra=rrdb_input, outer=scale,
        )  # fmt: skip
    return result.view(images, height, width, feat).permute(0, 3, 1, 2)


class _Trunk(torch.autograd.Function):
    """Arguments: input, residual scaling, dtype, five stacked weights, five stacked biases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *parameters: Tensor) -> Tensor:
        packed = PackedTrunk(parameters[:5], parameters[5:], x.dtype, backward=True)
        blocks, pixels = len(parameters[0]), x.shape[0] * x.shape[2] * x.shape[3]
        buffers = torch.empty(blocks, pixels, packed.pitch, dtype=x.dtype, device=x.device)
        result = run_trunk(x, packed, scale, buffers)
        ctx.save_for_backward(buffers)
        ctx.packed, ctx.scale, ctx.shape = packed, scale, (x.shape[0], x.shape[2], x.shape[3])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (buffers,) = ctx.saved_tensors
        packed, scale, shape = ctx.packed, ctx.scale, ctx.shape
        images, height, width = shape
        feat, growth, pitch = packed.feat, packed.growth, packed.pitch
        blocks = len(buffers)
        top = gradients[0].to(buffers.dtype).permute(0, 2, 3, 1).reshape(-1, feat)
        deltas = torch.empty_like(buffers)
        weight_gradients = torch.empty(
            blocks, pitch, 3, 3, pitch, dtype=buffers.dtype, device=buffers.device
        ).permute(0, 1, 4, 2, 3)
        like = weight_gradients[0]
        of_input, outer_top = top, top
        deltas[-1][:, :feat] = top * (scale * scale)
        # Weight gradients depend on the block's buffers only, and run in parallel to the chain of input gradients.
        for block in reversed(range(blocks)):
            delta, buffer = deltas[block], buffers[block]
            for segment in (4, 3, 2, 1):
                _launch(
                    delta, packed.backward[segment][block], delta, feat + (4 - segment) * growth, _MASK, shape,
                    other=buffer, other_offset=packed.segment(segment).start,
                )  # fmt: skip
            place = block % 3
            if place == 2:
                outer_top = of_input
            gradient = torch.empty_like(top)
            _launch(
                delta, packed.backward[0][block], gradient, 0, _INPUT, shape,
                other=of_input, scale=scale if place == 2 else 1.0,
                extra=outer_top if place == 0 else None,
                second=deltas[block - 1] if block else None, second_scale=scale * scale if place == 0 else scale,
            )  # fmt: skip
            of_input = gradient
            pixels = (images, height, width, pitch)
            with side_stream(top.device):
                weight_gradients[block] = torch.ops.aten.convolution_backward(
                    delta.view(pixels).permute(0, 3, 1, 2), buffer.view(pixels).permute(0, 3, 1, 2), like, None,
                    [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False],
                )[1]  # fmt: skip
        join_side_stream(top.device)
        bias_gradients = deltas.sum(1, dtype=torch.float32)
        of_weights, of_biases = [], []
        for conv in range(5):
            first = 0 if conv == 4 else feat + (3 - conv) * growth
            outputs = slice(first, first + (feat if conv == 4 else growth))
            inputs = feat + conv * growth
            of_weights.append(weight_gradients[:, outputs, :inputs].float())
            of_biases.append(bias_gradients[:, outputs])
        return (
            of_input.view(images, height, width, feat).permute(0, 3, 1, 2), None, *of_weights, *of_biases,
        )  # fmt: skip


def trunk(x: Tensor, body: nn.Sequential, scale: float) -> Tensor:
    """`body(x)` by the kernels, differentiable.

    Args:
        x: (N, feat, H, W), bfloat16 or float16, on a GPU.
        body: `RRDBNet.body`.
        scale: its residual scaling.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    parameters = stacked(body)
    if torch.is_grad_enabled():
        return _Trunk.apply(x, scale, *parameters)
    packed = PackedTrunk(parameters[:5], parameters[5:], x.dtype, backward=False)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return run_trunk(x, packed, scale, torch.empty(4, pixels, packed.pitch, dtype=x.dtype, device=x.device))
