"""The generator as MLflow serves it: this file, and the files logged with it.

MLflow copies this file into the logged model and executes it when the model is loaded, so it imports nothing of the
project that trained it. It runs on torch if that is installed (on a GPU if available), else on onnxruntime.

    model = mlflow.pyfunc.load_model("models:/esrgan-x4@champion")
    sr = model.predict(lr)                                # uint8 (N, H, W, 3) to uint8 (N, 4H, 4W, 3)
    sr = model.predict(lr, params={"tile": 256})          # bounded memory: tiles of 256 low-resolution pixels
    model = mlflow.pyfunc.load_model(uri, model_config={"device": "cpu"})
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

# Overlap around a tile, in low-resolution pixels; it is discarded from the result. Seams stay below 1/255.
HALO_PX = 48
NEGATIVE_SLOPE = 0.2

# (N, H, W, 3) uint8 to (N, H * scale, W * scale, 3) uint8.
Upscale = Callable[[np.ndarray], np.ndarray]


class Generator(PythonModel):
    """ESRGAN's generator behind MLflow's pyfunc interface."""

    upscale: Upscale
    scale: int
    multiple: int

    def load_context(self, context: Any) -> None:
        """Loads the network from the files that are logged with it."""
        files = {name: Path(path) for name, path in context.artifacts.items()}
        sizes = json.loads(files["architecture"].read_text())
        device = (context.model_config or {}).get("device", "auto")
        self.scale = sizes["scale"]
        # Generators for x2 and x1 start with a pixel unshuffle.
        self.multiple = {4: 1, 2: 2, 1: 4}[self.scale]
        try:
            import torch  # noqa: F401
        except ImportError:
            self.upscale = with_onnxruntime(files["onnx"], device)
        else:
            self.upscale = with_torch(files["weights"], sizes, self.multiple, device)

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Upscales a batch of images of one size.

        Args:
            context: unused.
            model_input: (N, H, W, 3) uint8 RGB.
            params: `tile`: tile size in low-resolution pixels, which bounds memory; 0: the whole image at once.

        Returns:
            (N, H * scale, W * scale, 3) uint8 RGB.

        Raises:
            ValueError: another shape or type, an empty image, a negative tile.
        """
        images = np.asarray(model_input)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"expected uint8 images (N, H, W, 3), got {images.dtype} {images.shape}")
        if 0 in images.shape:
            raise ValueError(f"expected at least one pixel, got {images.shape}")
        tile = int((params or {}).get("tile", 0))
        if tile < 0:
            raise ValueError(f"tile={tile}: give a number of pixels, or 0 for the whole image at once")
        height, width = images.shape[1:3]
        bottom, right = -height % self.multiple, -width % self.multiple
        padded = np.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
        result = self.upscale(padded) if tile == 0 else self._in_tiles(padded, tile)
        return np.ascontiguousarray(result[:, : height * self.scale, : width * self.scale])

    def _in_tiles(self, images: np.ndarray, tile: int) -> np.ndarray:
        count, height, width, _ = images.shape
        scale = self.scale
        stride = tile + -tile % self.multiple
        result = np.empty((count, height * scale, width * scale, 3), np.uint8)
        for index in range(count):
            for top in range(0, height, stride):
                for left in range(0, width, stride):
                    bottom, right = min(top + stride, height), min(left + stride, width)
                    y, x = max(0, top - HALO_PX), max(0, left - HALO_PX)
                    part = images[index : index + 1, y : bottom + HALO_PX, x : right + HALO_PX]
                    tile_result = self.upscale(np.ascontiguousarray(part))[0]
                    result[index, top * scale : bottom * scale, left * scale : right * scale] = tile_result[
                        (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale
                    ]
        return result


def with_torch(weights: Path, sizes: dict[str, Any], unshuffle: int, device: str) -> Upscale:
    """RRDBNet (ESRGAN, sec. 3.1) in torch, as a function of its weights."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    state = {
        name: torch.from_numpy(array).to(target, memory_format=torch.channels_last)
        if array.ndim == 4
        else torch.from_numpy(array).to(target)
        for name, array in read_safetensors(weights).items()
    }
    residual_scale = float(sizes["residual_scale"])

    def conv(name: str, x: Tensor, active: bool = False) -> Tensor:
        x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)
        return F.leaky_relu(x, NEGATIVE_SLOPE, inplace=True) if active else x

    def dense_block(name: str, x: Tensor) -> Tensor:
        features = [x]
        for number in (1, 2, 3, 4):
            features.append(conv(f"{name}.conv{number}", torch.cat(features, 1), active=True))
        return x + residual_scale * conv(f"{name}.conv5", torch.cat(features, 1))

    def network(x: Tensor) -> Tensor:
        first = conv("conv_first", F.pixel_unshuffle(x, unshuffle) if unshuffle > 1 else x)
        y = first
        for block in range(int(sizes["num_block"])):
            inner = y
            for number in (1, 2, 3):
                inner = dense_block(f"body.{block}.rdb{number}", inner)
            y = y + residual_scale * inner
        y = first + conv("conv_body", y)
        for name in ("conv_up1", "conv_up2"):
            y = conv(name, F.interpolate(y, scale_factor=2, mode="nearest"), active=True)
        return conv("conv_last", conv("conv_hr", y, active=True))

    @torch.inference_mode()
    def upscale(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.array(images)).to(target).permute(0, 3, 1, 2).float().div_(255)
        y = network(x.contiguous(memory_format=torch.channels_last))
        y = y.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return y.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    return upscale


def with_onnxruntime(file: Path, device: str) -> Upscale:
    """The same network from its ONNX file; uint8 images in and out."""
    import onnxruntime

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if device == "cpu":
        providers = providers[1:]
    available = onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(file, providers=[name for name in providers if name in available])
    name = session.get_inputs()[0].name

    def upscale(images: np.ndarray) -> np.ndarray:
        result: np.ndarray = session.run(None, {name: images})[0]
        return result

    return upscale


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Float32 tensors of a .safetensors file: 8 bytes of length, a JSON header, then the tensors' bytes.

    Raises:
        ValueError: a tensor of another type, or a file that is too short.
    """
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"{file.name}: {name} has type {entry['dtype']}, expected F32")
        begin, end = entry["data_offsets"]
        values = np.frombuffer(content[start + begin : start + end], np.float32)
        tensors[name] = values.reshape(entry["shape"]).copy()
    return tensors


set_model(Generator())
