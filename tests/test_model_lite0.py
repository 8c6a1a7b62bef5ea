"""EfficientNet-Lite0's features: equal to the network with its batch norms; as perceptual loss in training."""

from pathlib import Path

import pytest
import torch
from skimage import data
from tiny import fields, flags, train, write_sets
from torch import Tensor
from torch.nn import functional

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.model import LITE0_LAYERS, Lite0Features
from pipeline.model.lite0 import lite0_file

BLOCKS = [(1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6)]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return torch.load(lite0_file(), weights_only=True)


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return functional.batch_norm(x, *values, eps=1e-3)


def padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's "same" padding: the smaller half comes first."""
    missing = []
    for length in (x.shape[3], x.shape[2]):
        outputs = -(-length // stride)
        total = max((outputs - 1) * stride + kernel - length, 0)
        missing += [total // 2, total - total // 2]
    return functional.pad(x, missing)


def written_out(state: dict[str, Tensor], images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The outputs of stem and blocks, and the logits of ImageNet's classes."""
    x = (images * 255 - 127) / 128
    x = functional.conv2d(padded(x, 3, 2), state["_conv_stem.weight"], stride=2)
    x = functional.relu6(norm(state, "_bn0", x))
    outputs, index = [x], 0
    for repeats, kernel, first_stride, expansion in BLOCKS:
        for repeat in range(repeats):
            stride, name, y = first_stride if repeat == 0 else 1, f"_blocks.{index}", x
            if expansion > 1:
                y = functional.conv2d(y, state[f"{name}._expand_conv.weight"])
                y = functional.relu6(norm(state, f"{name}._bn0", y))
            weight = state[f"{name}._depthwise_conv.weight"]
            y = functional.conv2d(padded(y, kernel, stride), weight, stride=stride, groups=len(weight))
            y = functional.relu6(norm(state, f"{name}._bn1", y))
            y = norm(state, f"{name}._bn2", functional.conv2d(y, state[f"{name}._project_conv.weight"]))
            x = x + y if x.shape == y.shape and stride == 1 else y
            index += 1
        outputs.append(x)
    x = functional.relu6(norm(state, "_bn1", functional.conv2d(x, state["_conv_head.weight"])))
    return outputs, functional.linear(x.mean((2, 3)), state["_fc.weight"], state["_fc.bias"])


@pytest.mark.parametrize("size", [(64, 96), (65, 83), (1, 1)])
def test_features_equal_the_network_with_its_batch_norms(
    state: dict[str, Tensor], size: tuple[int, int]
) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    outputs = Lite0Features(LITE0_LAYERS)(images)
    expected, _ = written_out(state, images)
    assert tuple(outputs) == LITE0_LAYERS
    for output, reference in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-4)


def test_the_network_that_features_are_compared_with_recognizes_a_cat(state: dict[str, Tensor]) -> None:
    image = torch.from_numpy(data.chelsea()[:, 75:375]).permute(2, 0, 1)[None].float()
    small = functional.interpolate(image, (224, 224), mode="bicubic", antialias=True) / 255
    best = written_out(state, small)[1].argmax().item()
    assert 281 <= best <= 285  # ImageNet's cats


def test_a_layers_features_do_not_depend_on_the_other_layers() -> None:
    images = torch.rand(1, 3, 40, 40)
    together = Lite0Features(["block2", "stem"])(images)
    assert list(together) == ["stem", "block2"]
    for name, features in together.items():
        assert torch.equal(Lite0Features({name: 1.0})(images)[name], features)


def test_gradients_reach_the_image_and_not_the_weights() -> None:
    network = Lite0Features(["block1"])
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    network(images)["block1"].abs().mean().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("layers", [["conv5_4"], []])
def test_an_unknown_layer_is_refused(layers: list[str]) -> None:
    with pytest.raises(UserError, match="EfficientNet-Lite0 has stem, block1, "):
        Lite0Features(layers)


@pytest.mark.parametrize(
    ("weights", "layer", "known"),
    [("efficientnet_lite0", "conv5_4", "stem, block1, block2"), ("imagenet", "block1", "conv1_1, conv1_2")],
)
def test_perceptual_layers_must_be_of_the_network(
    tmp_path: Path, weights: str, layer: str, known: str
) -> None:
    changes = {"perceptual.weights": weights, "perceptual.layers": {layer: 1.0}}
    message = rf"perceptual: layers has {layer}, which weights={weights} lacks; it has {known}"
    with pytest.raises(UserError, match=message) as caught:
        load_config(flags(fields(tmp_path, **changes)), description="", environment={})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_stage_2_trains_with_these_features_and_validates_with_them(tmp_path: Path) -> None:
    changes = {
        "perceptual.weights": "efficientnet_lite0",
        "perceptual.layers": {"stem": 0.1, "block1": 0.1},
        "validation.metrics": ["psnr_y", "feature_distance", "color_drift"],
    }
    result = train(write_sets(tmp_path), **changes)
    assert result.step == 12
    drifts = {f"color_drift{suffix}" for suffix in ("", "_r", "_g", "_b")}
    assert result.metrics.keys() == {"psnr_y", "feature_distance"} | drifts
    assert all(torch.isfinite(torch.tensor(list(result.metrics.values()))))
