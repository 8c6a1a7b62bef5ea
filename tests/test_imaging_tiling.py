"""Upscaling tile by tile, and the levels of its output."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.imaging import bicubic_upscale, prepared, upscale
from pipeline.model import RRDBNet, seeded


@pytest.fixture(scope="module")
def generator() -> RRDBNet:
    """Weights large enough for seams to be visible."""
    network = seeded(0, lambda: RRDBNet(8, 2, 4))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "body" in name and parameter.ndim > 1:
                parameter.mul_(8)
    return network


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Constant(nn.Module):
    """Every pixel of its output has one value."""

    scale, unshuffle = 1, 1

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x) * self.value


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_levels_are_clamped_and_rounded_half_to_even(dtype: type) -> None:
    most = np.iinfo(dtype).max
    for value, level in [
        (-1.0, 0),
        (0.5 / most, 0),
        (1.5 / most, 2),
        (2.4 / most, 2),
        (7.0, most),
        (np.nan, 0),
    ]:
        output = upscale(Constant(value), np.zeros((1, 1, 3), dtype))
        assert (output.dtype, set(output.ravel().tolist())) == (dtype, {level})


@pytest.mark.parametrize(("tile_px", "size"), [(16, (40, 33)), (25, (51, 26)), (7, (5, 20)), (64, (10, 12))])
def test_tiles_have_no_seams(generator: RRDBNet, tile_px: int, size: tuple[int, int]) -> None:
    lr = photo(*size)
    whole, tiled = upscale(generator, lr), upscale(generator, lr, tile_px=tile_px)
    assert whole.shape == (4 * size[0], 4 * size[1], 3)
    assert np.abs(whole.astype(int) - tiled).max() <= 1


def test_without_overlap_seams_are_visible(generator: RRDBNet) -> None:
    lr = photo(40, 33)
    difference = np.abs(upscale(generator, lr).astype(int) - upscale(generator, lr, tile_px=16, halo_px=0))
    assert difference.max() > 1


@pytest.mark.parametrize("scale", [4, 2, 1])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (13, 18)])
def test_any_size_is_upscaled(scale: int, size: tuple[int, int]) -> None:
    network = seeded(0, lambda: RRDBNet(4, 1, 2, scale=scale))
    lr = photo(*size)
    whole = upscale(network, lr)
    assert whole.shape == (scale * size[0], scale * size[1], 3)
    assert np.abs(whole.astype(int) - upscale(network, lr, tile_px=5)).max() <= 1


class _Spy(nn.Module):
    """Nearest-neighbor upscaling that records its inputs."""

    scale = 4
    unshuffle = 1

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.pixels: list[int] = []
        self.formats: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.pixels.append(x.shape[2] * x.shape[3])
        self.formats.add(x.is_contiguous(memory_format=torch.channels_last))
        return x.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_tile_size_bounds_the_network_input() -> None:
    spy, lr = _Spy(), photo(100, 130)
    np.testing.assert_array_equal(upscale(spy, lr, tile_px=20, halo_px=6), lr.repeat(4, 0).repeat(4, 1))
    assert max(spy.pixels) <= (20 + 2 * 6) ** 2
    assert len(spy.pixels) == 5 * 7
    assert spy.formats == {True}


def test_memory_format_and_precision_change_little(generator: RRDBNet) -> None:
    lr = bicubic_upscale(photo(4, 5))
    expected = upscale(generator, lr, channels_last=False).astype(int)
    assert np.abs(expected - upscale(generator, lr)).max() <= 1
    half = np.abs(expected - upscale(generator, lr, dtype=torch.bfloat16))
    assert 0 < half.max() <= 8


def test_the_network_is_not_modified(generator: RRDBNet) -> None:
    generator.train()
    upscale(generator, photo(6, 6), tile_px=4)
    assert generator.training
    assert all(p.requires_grad and p.is_contiguous() for p in generator.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_weights_give_the_same_pixels_and_are_a_copy(generator: RRDBNet, dtype: torch.dtype) -> None:
    lr = bicubic_upscale(photo(4, 5))
    ready = prepared(generator, "cpu", dtype)
    one, other = upscale(ready, lr, dtype=dtype), upscale(generator, lr, dtype=dtype)
    assert np.abs(one.astype(int) - other).max() <= 1  # channels-last weights are added in another order
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.float32}
    assert ready.conv_body.weight.dtype == dtype
    assert ready.conv_last.weight.dtype == torch.float32
    assert ready.conv_body.weight.is_contiguous(memory_format=torch.channels_last)
    assert not ready.training


def test_invalid_input_raises_a_clear_error(generator: RRDBNet) -> None:
    for lr, options, message in [
        (photo(4, 4)[..., :1], {}, "1 channels"),
        (photo(4, 4)[..., 0], {}, "lr: expected uint8"),
        (photo(4, 4), {"tile_px": 0}, "tile_px=0"),
        (photo(4, 4), {"halo_px": -1}, "halo_px=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            upscale(generator, lr, **options)
