"""Weight files as other programs write them: those that are read, and the error for any other."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import user_error
from test_model_weights import assert_same, first_naming, network, pth
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation.models import open_model
from pipeline.model import RRDBNet, UNetDiscriminator, VGGStyleDiscriminator, decode_generator
from pipeline.model.weight_forms import WRAPPERS

State = dict[str, Tensor]
DOCS = Path(__file__).parent.parent / "docs" / "inputs.md"


def prefixed(prefix: str) -> Callable[[State], object]:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "form",
    [
        *(
            pytest.param(lambda state, key=key: {key: state, "iter": 7}, id=f"wrapper {key}")
            for key in WRAPPERS
        ),
        *(
            pytest.param(prefixed(prefix), id=prefix)
            for prefix in (
                "module.",
                "netG.",
                "generator.",
                "_orig_mod.",
                "module._orig_mod.",
                "_orig_mod.module.",
            )
        ),
        pytest.param(lambda s: {"n_averaged": torch.tensor(5), **prefixed("module.")(s)}, id="AveragedModel"),  # type: ignore[dict-item]
        pytest.param(lambda s: {"state_dict": prefixed("generator.")(s), "meta": {}}, id="mmagic"),
        pytest.param(lambda s: {"params": {**s, "step": 5}}, id="a number in the state dict"),
        pytest.param(lambda s: {"state_dict": s, "best_psnr": np.float64(27.3)}, id="numpy number"),
        pytest.param(lambda s: {"params": s, "curve": np.zeros(3), "n": np.int64(1)}, id="numpy array"),
        pytest.param(
            lambda s: {"params": s, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}},
            id="optimizer",
        ),
        pytest.param(
            lambda s: {"state_dict": {**prefixed("netG.")(s), "netD.conv0.weight": torch.zeros(1)}},  # type: ignore[dict-item]
            id="two networks",
        ),
        pytest.param(lambda s: {k: v.double() for k, v in s.items()}, id="float64"),
        pytest.param(lambda s: s, id="plain"),
    ],
)
def test_a_form_is_read(form: Callable[[State], object]) -> None:
    saved = network()
    assert_same(saved, decode_generator(pth(form(dict(saved.state_dict()))), "file")[0])


def test_ema_weights_come_first_in_every_form() -> None:
    saved, other = network(), {name: tensor * 0 for name, tensor in network().state_dict().items()}
    for form in (
        {"params": other, "params-ema": saved.state_dict()},
        {"model": other, "ema": saved.state_dict()},
        {**prefixed("generator.")(other), **prefixed("generator_ema.")(dict(saved.state_dict()))},  # type: ignore[dict-item]
    ):
        assert_same(saved, decode_generator(pth(form), "file")[0])


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pth.tar", ".PTH"])
def test_a_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"g{suffix}").write_bytes(pth(network().state_dict()))
    generator = open_model(str(tmp_path / f"g{suffix}")).generator
    assert generator is not None
    assert_same(network(), generator)


def first_repository(scale: int) -> bytes:
    """A generator of another scale in the first repository: x2 has one upsampling layer, x8 three."""
    layers = {
        "conv_up1": 3,
        "conv_up2": 6,
        "conv_hr": {1: 2, 2: 5, 8: 11}[scale],
        "conv_last": {1: 4, 2: 7, 8: 13}[scale],
    }
    state = {}
    for name, tensor in network().state_dict().items():
        layer, _, kind = name.partition(".")
        if layer in layers:
            if (layer == "conv_up1" and scale < 2) or (layer == "conv_up2" and scale < 4):
                continue
            state[f"model.{layers[layer]}.{kind}"] = tensor
        else:
            state[first_naming(name, 1)] = tensor
    if scale == 8:
        state["model.9.weight"] = network().state_dict()["conv_up2.weight"]
    return pth(state)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("4x_net.pth", pth(network().state_dict()))
    return buffer.getvalue()


def without(*layers: str) -> bytes:
    return pth(
        {
            name: tensor
            for name, tensor in network().state_dict().items()
            if name.partition(".")[0] not in layers
        }
    )


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('pathlib').Path('unpickled').touch()",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (first_repository(1), "an x1 generator with its own number of upsampling layers"),
        (first_repository(2), "an x2 generator with its own number of upsampling layers"),
        (first_repository(8), "an x8 generator with its own number of upsampling layers"),
        (without("conv_up2"), "an x2 generator"),
        (without("conv_up1", "conv_up2"), "an x1 generator"),
        (
            pth({**network().state_dict(), "model.1.sub.0.RDB1.conv1x1.weight": torch.zeros(1)}),
            "a generator of ESRGAN+",
        ),
        (pth({"params": UNetDiscriminator(4).state_dict()}), "a U-Net discriminator.* give the generator's file"),
        (pth(VGGStyleDiscriminator(32, 4).state_dict()), "a VGG-style discriminator.* give the generator's file"),
        (
            pth({"epoch": 1, "iter": 5, "optimizers": [{"state": {}}], "schedulers": []}),
            "a training state .* give the network's file",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 67\n", "run: git lfs pull"),
        (b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning", "HTML .* download the file itself"),
        (b"", "an empty file; download it again"),
        (archive(), "contains 4x_net.pth; unpack it"),
        (pth(network().state_dict())[:-300], "truncated or corrupt; download it again"),
        (b"\x08\x07\x12\x07pytorch" + bytes(40), "ONNX"),
        (pth(_Evil()), r"objects other than tensors \(eval\), which are never unpickled"),
        (pickle.dumps({"params": _Evil()}, protocol=2), r"objects other than tensors \(eval\)"),
        (pth(network()), r"pipeline.model.rrdbnet.RRDBNet\), which are never unpickled; save the state dict alone"),
    ],
)  # fmt: skip
def test_any_other_file_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        decode_generator(content, "weights.pth")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_is_named_by_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"\x08\x07")
    text = user_error("export_model", "--model", tmp_path / "w.onnx", "--output", tmp_path / "w.pth")
    assert "an .onnx file's source is one" in text


def test_the_docs_list_every_wrapper_and_prefix() -> None:
    text = DOCS.read_text()
    for each in (*WRAPPERS, "module.", "netG.", "generator.", "_orig_mod.", "n_averaged"):
        assert f"`{each}`" in text


def test_numpy_names_are_only_allowed_while_weights_are_read() -> None:
    before = set(torch.serialization.get_safe_globals())
    decode_generator(pth(network().state_dict()), "file")
    assert set(torch.serialization.get_safe_globals()) == before
    assert RRDBNet not in before
