"""The generator as an ONNX file that takes and gives 8-bit images.

The graph is written node by node, after `RRDBNet.forward`: torch's exporter takes minutes for 23 blocks, this a
fraction of a second, with the same file each time.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pipeline.model.rrdbnet import NEGATIVE_SLOPE, RRDB, DenseBlock, RRDBNet

OPSET = 18
IR_VERSION = 10


def export_onnx(generator: RRDBNet, path: str | os.PathLike[str]) -> None:
    """Writes one self-contained ONNX file: input `lr` uint8 (N, H, W, 3), output `sr` uint8 (N, H', W', 3).

    N, H and W are free; H' = scale * H. At scale 2 and 1, H and W must be multiples of 2 and 4. Levels are rounded
    half to even. onnxruntime runs it without torch, and agrees to one level.
    """
    graph = _Graph()
    x = graph.add("Transpose", "lr", perm=[0, 3, 1, 2])
    x = graph.add("Div", graph.add("Cast", x, to=TensorProto.FLOAT), graph.constant("levels", 255.0))
    x = _network(graph, generator, x)
    x = graph.add("Clip", x, graph.constant("black", 0.0), graph.constant("white", 1.0))
    x = graph.add("Round", graph.add("Mul", x, graph.constant("levels", 255.0)))
    x = graph.add("Cast", x, to=TensorProto.UINT8)
    graph.add("Transpose", x, output="sr", perm=[0, 2, 3, 1])
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "RRDBNet",
            [helper.make_tensor_value_info("lr", TensorProto.UINT8, ["N", "H", "W", 3])],
            [helper.make_tensor_value_info("sr", TensorProto.UINT8, ["N", "H_out", "W_out", 3])],
            list(graph.initializers.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="esrgan-ray",
    )
    onnx.checker.check_model(model, full_check=True)
    Path(path).write_bytes(model.SerializeToString())


class _Graph:
    """Nodes in order, and the tensors that they read."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Appends a node; gives the name of its output."""
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, value: float | list[float] | np.ndarray) -> str:
        """A float32 tensor by this name, made once."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, np.float32), name)
        return name

    def conv(self, x: str, name: str, conv: nn.Conv2d, weight: np.ndarray | None = None) -> str:
        """A 3x3 convolution; its tensors get their names in the state dict."""
        assert conv.bias is not None
        weight = _array(conv.weight) if weight is None else weight
        tensors = self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", _array(conv.bias))
        return self.add("Conv", x, *tensors, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def activation(self, x: str) -> str:
        return self.add("LeakyRelu", x, alpha=NEGATIVE_SLOPE)

    def residual(self, x: str, change: str, scale: float) -> str:
        return self.add("Add", x, self.add("Mul", change, self.constant(f"residual_scale_{scale}", scale)))


def _network(graph: _Graph, generator: RRDBNet, x: str) -> str:
    first = _array(generator.conv_first.weight)
    if generator.unshuffle > 1:
        x = graph.add("SpaceToDepth", x, blocksize=generator.unshuffle)
        # ONNX puts a fold's position before the colour, torch the colour before the position.
        features, folded = first.shape[:2]
        first = first.reshape(features, 3, folded // 3, 3, 3).swapaxes(1, 2).reshape(first.shape)
    start = graph.conv(x, "conv_first", generator.conv_first, first)
    x = start
    for number, block in enumerate(generator.body):
        assert isinstance(block, RRDB)
        inside = x
        for part, dense in enumerate((block.rdb1, block.rdb2, block.rdb3), start=1):
            inside = _dense_block(graph, f"body.{number}.rdb{part}", dense, inside)
        x = graph.residual(x, inside, generator.residual_scale)
    x = graph.add("Add", start, graph.conv(x, "conv_body", generator.conv_body))
    for name, conv in (("conv_up1", generator.conv_up1), ("conv_up2", generator.conv_up2)):
        x = graph.add(
            "Resize", x, "", graph.constant("twice", [1, 1, 2, 2]),
            mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip
        x = graph.activation(graph.conv(x, name, conv))
    x = graph.activation(graph.conv(x, "conv_hr", generator.conv_hr))
    return graph.conv(x, "conv_last", generator.conv_last)


def _dense_block(graph: _Graph, name: str, block: DenseBlock, x: str) -> str:
    inputs = [x]
    for number, conv in enumerate((block.conv1, block.conv2, block.conv3, block.conv4, block.conv5), start=1):
        joined = graph.add("Concat", *inputs, axis=1) if len(inputs) > 1 else x
        output = graph.conv(joined, f"{name}.conv{number}", conv)
        inputs.append(graph.activation(output) if number < 5 else output)
    return graph.residual(x, inputs[-1], block.residual_scale)


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()
