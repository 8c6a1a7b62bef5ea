"""The generator as an MLflow pyfunc model: this file, and the files logged with it.

MLflow copies this file into the logged model and runs it where the model is loaded, so it imports nothing from the
project that trained the generator. The network's definition, rrdbnet.py, is one of the logged files. Inference runs
in torch if it is installed, on a GPU if one is present; otherwise in onnxruntime.

    model = mlflow.pyfunc.load_model("models:/esrgan-x4@champion")
    sr = model.predict(lr)                             # uint8 (N, H, W, 3) to uint8 (N, 4H, 4W, 3)
    sr = model.predict(lr, params={"tile": 64})        # smaller tiles than the default, less memory
    png = model.predict([base64_png])                  # base64 PNG, JPEG, ... in, base64 PNG out, for servers
    model = mlflow.pyfunc.load_model(uri, model_config={"device": "cpu"})
"""

import base64
import binascii
import io
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

# Overlap around a tile, in LR pixels, which is cropped from the result: seams stay under 1/255.
HALO_PX = 48
# As `upscale.py` on a CPU: images of more than 512 x 512 pixels are computed in tiles of 256.
WHOLE_UP_TO_PX = 512 * 512
AUTO_TILE_PX = 256
AUTO = -1

# (N, H, W, 3) uint8 to (N, H * scale, W * scale, 3) uint8.
Upscale = Callable[[np.ndarray], np.ndarray]


class InputError(MlflowException, ValueError):
    """Wrong input; a server answers with status 400 and the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)


class Generator(PythonModel):
    """ESRGAN's generator behind MLflow's pyfunc interface."""

    upscale: Upscale
    scale: int
    multiple: int

    def load_context(self, context: Any) -> None:
        """Loads the network from the files that were logged with it."""
        files = {name: Path(path) for name, path in context.artifacts.items()}
        architecture = json.loads(files["architecture"].read_text())
        device = (context.model_config or {}).get("device", "auto")
        self.scale = architecture["scale"]
        # Generators for x2 and x1 start with a pixel unshuffle, by 2 and by 4.
        self.multiple = 4 // self.scale
        try:
            import torch  # noqa: F401
        except ImportError:
            self.upscale = with_onnxruntime(files["onnx"], device)
        else:
            self.upscale = with_torch(files["code"], files["weights"], architecture, device)

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray | list[str]:
        """Super-resolves a batch of images of one size, or a list of image files.

        Args:
            context: unused.
            model_input: (N, H, W, 3) RGB: uint8, or other integers from 0 to 255; or a list of base64 strings of image
                files, which may have different sizes. MLflow also passes a DataFrame, and warns about a hint with Any.
            params: `tile`: side of a tile in LR pixels, which bounds memory; 0: the whole image at once; -1: 256 for
                images of more than 512 x 512 pixels.

        Returns:
            (N, H * scale, W * scale, 3) uint8 RGB; for files a list of base64 strings of PNG files.

        Raises:
            InputError: dtype, values, shape or file is not supported, an image is empty, or `tile` is out of range.
        """
        tile = int((params or {}).get("tile", AUTO))
        if tile < AUTO:
            raise InputError(
                f"tile={tile}: give a number of pixels, 0 for the whole image at once, or {AUTO}"
            )
        # A DataFrame has one column of strings.
        to_numpy = getattr(model_input, "to_numpy", None)
        images = np.asarray(to_numpy() if to_numpy else model_input)
        if images.dtype.kind in "USO":
            return [_encoded_png(self._upscaled(_decoded(text)[None], tile)[0]) for text in images.ravel()]
        return self._upscaled(_uint8(images), tile)

    def _upscaled(self, images: np.ndarray, tile: int) -> np.ndarray:
        height, width = images.shape[1:3]
        if tile == AUTO:
            tile = AUTO_TILE_PX if height * width > WHOLE_UP_TO_PX else 0
            # Several images at once need the memory of all.
            count = max(1, WHOLE_UP_TO_PX // (height * width))
            if len(images) > count:
                parts = [images[first : first + count] for first in range(0, len(images), count)]
                return np.concatenate([self._upscaled(part, tile) for part in parts])
        bottom, right = -height % self.multiple, -width % self.multiple
        padded = np.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
        sr = self.upscale(padded) if tile == 0 else self._in_tiles(padded, tile)
        return np.ascontiguousarray(sr[:, : height * self.scale, : width * self.scale])

    def _in_tiles(self, images: np.ndarray, tile: int) -> np.ndarray:
        count, height, width, _ = images.shape
        scale = self.scale
        stride = tile + -tile % self.multiple
        sr = np.empty((count, height * scale, width * scale, 3), np.uint8)
        for index in range(count):
            for top in range(0, height, stride):
                for left in range(0, width, stride):
                    bottom, right = min(top + stride, height), min(left + stride, width)
                    y, x = max(0, top - HALO_PX), max(0, left - HALO_PX)
                    lr_tile = images[index : index + 1, y : bottom + HALO_PX, x : right + HALO_PX]
                    sr_tile = self.upscale(np.ascontiguousarray(lr_tile))[0]
                    sr[index, top * scale : bottom * scale, left * scale : right * scale] = sr_tile[
                        (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale
                    ]
        return sr


def _uint8(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) of any integer dtype as uint8. Raises InputError."""
    if images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"expected images (N, H, W, 3), got the shape {images.shape}")
    if 0 in images.shape:
        raise InputError(f"expected at least one pixel, got the shape {images.shape}")
    low, high = images.min(), images.max()
    if images.dtype.kind not in "iu":
        raise InputError(
            f"expected integers from 0 to 255, got {images.dtype} from {low:g} to {high:g}; convert it to uint8, "
            "or send it as a base64 PNG"
        )
    if low < 0 or high > 255:
        raise InputError(f"expected integers from 0 to 255, got {low} to {high}")
    return images.astype(np.uint8, copy=False)


def _decoded(text: Any) -> np.ndarray:
    """(H, W, 3) uint8 of a base64 image file (str or bytes), also as a data: address. Raises InputError."""
    from PIL import Image, ImageOps

    if isinstance(text, bytes):
        text = text.decode("latin-1")  # base64 is ASCII; other bytes are refused below
    try:
        content = base64.b64decode(str(text).partition("base64,")[2] or str(text), validate=True)
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")))
        if image.mode.startswith("I"):  # 16-bit gray, which convert("RGB") clips at 255
            levels = (np.asarray(image).astype(np.uint32) + 128) // 257
            return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"expected base64 of a PNG, JPEG or WebP file, got {str(text)[:20]!r} ({error})"
        ) from None


def _encoded_png(pixels: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return base64.b64encode(buffer.getvalue()).decode()


def with_torch(code: Path, weights: Path, architecture: dict[str, Any], device: str) -> Upscale:
    """The network in torch.

    Args:
        code: rrdbnet.py.
        weights: .safetensors file.
        architecture: `RRDBNet`'s arguments.
        device: a torch device, or "auto".
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # By path and not by module name: several models loaded in one process each get their own definition.
    definition = runpy.run_path(str(code))
    with torch.device("meta"):
        generator = definition["RRDBNet"](**architecture)
    state = {name: torch.from_numpy(array) for name, array in read_safetensors(weights).items()}
    generator.load_state_dict(state, assign=True)
    generator.eval().to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def upscale(images: np.ndarray) -> np.ndarray:
        sr = definition["upscale_8bit"](generator, torch.from_numpy(np.array(images)).to(device))
        return sr.contiguous().cpu().numpy()

    return upscale


def with_onnxruntime(file: Path, device: str) -> Upscale:
    """The same network from its ONNX file."""
    import onnxruntime

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if device == "cpu":
        providers = providers[1:]
    available = onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(file, providers=[name for name in providers if name in available])

    def upscale(images: np.ndarray) -> np.ndarray:
        sr: np.ndarray = session.run(["sr"], {"lr": images})[0]
        return sr

    return upscale


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Float32 tensors of a .safetensors file: 8 bytes of header length, a JSON header, then the tensors' bytes.

    MLflow and torch do not depend on the package `safetensors`.

    Raises:
        ValueError: a tensor is not float32, or the file is truncated.
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
