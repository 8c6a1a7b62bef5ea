"""Weight files: round trips, published parameter names, and rejected content."""

import io
import math
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from evaluation_helpers import load_generator
from safetensors import safe_open
from torch import Tensor

from pipeline.errors import UserError
from pipeline.model import (
    RRDBNet,
    decode_generator,
    generator_sha256,
    save_generator,
    seeded,
)
from pipeline.model.weights import encode_generator


def network(**sizes: float) -> RRDBNet:
    return seeded(3, lambda: RRDBNet(**{"num_feat": 4, "num_block": 1, "num_grow_ch": 2, **sizes}))


def first_naming(name: str, blocks: int) -> str:
    """The parameter names of ESRGAN's first repository."""
    for pattern, replacement in [
        (r"^conv_first\.", "model.0."),
        (r"^body\.(\d+)\.rdb(\d)\.conv(\d)\.", r"model.1.sub.\1.RDB\2.conv\3.0."),
        (r"^conv_body\.", f"model.1.sub.{blocks}."),
        (r"^conv_up1\.", "model.3."),
        (r"^conv_up2\.", "model.6."),
        (r"^conv_hr\.", "model.8."),
        (r"^conv_last\.", "model.10."),
    ]:
        name = re.sub(pattern, replacement, name)
    return name


def second_naming(name: str, blocks: int) -> str:
    """The parameter names of the same repository, later; also BSRGAN's."""
    for pattern, replacement in [
        (r"^body\.(\d+)\.rdb(\d)\.", r"RRDB_trunk.\1.RDB\2."),
        (r"^conv_body\.", "trunk_conv."),
        (r"^conv_up(\d)\.", r"upconv\1."),
        (r"^conv_hr\.", "HRconv."),
    ]:
        name = re.sub(pattern, replacement, name)
    return name


def assert_same(a: RRDBNet, b: RRDBNet) -> None:
    state = b.state_dict()
    assert a.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in a.state_dict().items())
    x = torch.rand(1, 3, 8, 8)
    b.residual_scale = a.residual_scale
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("scale", [4, 2, 1])
@pytest.mark.parametrize(("num_feat", "num_block", "num_grow_ch"), [(4, 1, 2), (6, 3, 5), (5, 11, 1)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_sizes_are_read_from_the_file(
    tmp_path: Path, suffix: str, num_feat: int, num_block: int, num_grow_ch: int, scale: int
) -> None:
    saved = network(num_feat=num_feat, num_block=num_block, num_grow_ch=num_grow_ch, scale=scale)
    save_generator(saved, tmp_path / f"g{suffix}")
    loaded, info = load_generator(tmp_path / f"g{suffix}")
    assert_same(saved, loaded)
    assert {info[key] for key in ("num_feat", "num_block", "num_grow_ch", "scale")} == {
        str(size) for size in (num_feat, num_block, num_grow_ch, scale)
    }
    assert [path.name for path in tmp_path.iterdir()] == [f"g{suffix}"]


def test_residual_scale_comes_from_the_metadata_or_is_the_papers(tmp_path: Path) -> None:
    saved = network(residual_scale=0.35)
    for suffix, scale, source in [(".safetensors", 0.35, "metadata"), (".pth", 0.2, "default")]:
        save_generator(saved, tmp_path / f"g{suffix}")
        loaded, info = load_generator(tmp_path / f"g{suffix}")
        assert (loaded.residual_scale, info["residual_scale_source"]) == (scale, source)
        assert loaded.body[0].rdb1.residual_scale == scale


def test_metadata_is_kept_and_cannot_replace_the_sizes(tmp_path: Path) -> None:
    save_generator(network(), tmp_path / "g.safetensors", {"license": "CC0", "num_feat": "999"})
    _, info = load_generator(tmp_path / "g.safetensors")
    assert (info["license"], info["num_feat"], info["architecture"]) == ("CC0", "4", "RRDBNet")
    with safe_open(tmp_path / "g.safetensors", "pt") as file:
        assert file.metadata()["num_block"] == "1"


def test_equal_networks_give_equal_bytes() -> None:
    metadata = {str(number): "text" for number in range(20)}
    assert len({encode_generator(network(), metadata) for _ in range(5)}) == 1
    assert decode_generator(encode_generator(network(), metadata), "bytes")[1].items() >= metadata.items()


def test_loading_draws_no_random_number_and_returns_trainable_weights(tmp_path: Path) -> None:
    save_generator(network(), tmp_path / "g.pth")
    before = torch.get_rng_state()
    loaded, _ = load_generator(tmp_path / "g.pth")
    assert torch.equal(torch.get_rng_state(), before)
    loaded(torch.rand(1, 3, 4, 4)).sum().backward()
    assert all(parameter.grad is not None and not parameter.is_meta for parameter in loaded.parameters())


@pytest.mark.parametrize("naming", [first_naming, second_naming, lambda name, blocks: f"module.{name}"])
@pytest.mark.parametrize("wrap", [None, "params", "params_ema"])
def test_published_parameter_names_are_read(tmp_path: Path, naming, wrap: str | None) -> None:  # type: ignore[no-untyped-def]
    saved = network(num_block=12)
    state = {naming(name, 12): tensor for name, tensor in saved.state_dict().items()}
    torch.save({wrap: state, "step": 7} if wrap else state, tmp_path / "old.pth")
    loaded, info = load_generator(tmp_path / "old.pth")
    assert_same(saved, loaded)
    assert info["num_block"] == "12"


def test_ema_weights_are_preferred(tmp_path: Path) -> None:
    ema, plain = network(), seeded(9, lambda: RRDBNet(4, 1, 2))
    torch.save({"params": plain.state_dict(), "params_ema": ema.state_dict()}, tmp_path / "both.pth")
    assert_same(ema, load_generator(tmp_path / "both.pth")[0])


def test_half_precision_and_legacy_files_are_read(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in network().state_dict().items()}
    torch.save(state, tmp_path / "half.pth", _use_new_zipfile_serialization=False)
    loaded, _ = load_generator(tmp_path / "half.pth")
    assert loaded.conv_first.weight.dtype == torch.float32
    assert torch.equal(loaded.conv_first.weight, state["conv_first.weight"].float())


def test_the_format_is_detected_from_the_content(tmp_path: Path) -> None:
    (tmp_path / "g.pth").write_bytes(encode_generator(network()))
    assert_same(network(), load_generator(tmp_path / "g.pth")[0])


@pytest.fixture(scope="module")
def saved() -> RRDBNet:
    return network()


@pytest.mark.parametrize("low_byte", range(256))
def test_a_safetensors_header_may_have_any_length(saved: RRDBNet, low_byte: int) -> None:
    content = safetensors.torch.save(saved.state_dict(), {"license": "CC0"})
    length = int.from_bytes(content[:8], "little")
    padded = length + (low_byte - length) % 256
    content = padded.to_bytes(8, "little") + content[8 : 8 + length].ljust(padded) + content[8 + length :]
    loaded, info = decode_generator(content, "padded")
    assert content[0] == low_byte
    assert_same(saved, loaded)
    assert info["license"] == "CC0"


def test_a_pth_file_has_basicsrs_structure(tmp_path: Path) -> None:
    save_generator(network(), tmp_path / "g.pth")
    content = torch.load(tmp_path / "g.pth", weights_only=True)
    assert list(content) == ["params_ema"]
    assert content["params_ema"].keys() == network().state_dict().keys()


def test_sha256_depends_on_every_weight_and_not_on_the_order() -> None:
    state = network().state_dict()
    digest = generator_sha256(state)
    assert digest == generator_sha256(dict(reversed(state.items())))
    assert re.fullmatch("[0-9a-f]{64}", digest)
    for name in state:
        changed = {key: tensor.clone() for key, tensor in state.items()}
        changed[name].view(-1)[-1] += 1e-3
        assert generator_sha256(changed) != digest


def pth(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def changed_state(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {
        **network().state_dict(),
        **{name.replace("__", "."): tensor for name, tensor in changes.items()},
    }
    return {name: tensor for name, tensor in state.items() if tensor is not None}


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('pathlib').Path('unpickled').touch()",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as weights"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"{" * 100, "neither a safetensors header nor PyTorch's"),
        (encode_generator(network())[:100], "not readable as weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "not readable as weights"),
        (pth(network().state_dict())[:-300], "not readable as weights"),
        (encode_generator(network())[:-5], "not readable as weights"),
        (pickle.dumps({"a": 1}, protocol=2), "not readable as weights"),
        (pth({"x": _Evil()}), "not readable as weights"),
        (pth([1, 2]), "contains no state dict"),
        (pth({"params": {"a": 3}}), "contains no state dict"),
        (pth({}), "contains no state dict"),
        (safetensors.torch.save({"weight": torch.zeros(2)}), "conv_first.weight is missing"),
        (
            pth(changed_state(conv_first__weight=torch.zeros(4))),
            "conv_first.weight is missing or has another shape",
        ),
        (pth(changed_state(conv_first__weight=torch.zeros(4, 1, 3, 3))), "takes 1 channels"),
        (
            pth(changed_state(conv_last__weight=torch.zeros(1, 4, 3, 3))),
            r"conv_last.weight has shape \(1, 4, 3, 3\)",
        ),
        (pth(changed_state(conv_up2__bias=None)), "conv_up2.bias is missing"),
        (pth(changed_state(body__0__rdb2__conv3__weight=None)), "body.0.rdb2.conv3.weight is missing"),
        (
            pth(changed_state(attention__weight=torch.zeros(1))),
            "1 unknown parameters, the first is attention.weight",
        ),
        (
            safetensors.torch.save(changed_state(conv_hr__bias=torch.tensor([0, math.nan, 0, 0]))),
            "conv_hr.bias holds non-finite values",
        ),
        (
            pth(changed_state(conv_last__bias=torch.tensor([0, 0, -math.inf]))),
            "conv_last.bias holds non-finite",
        ),
        (
            pth({"params_ema": changed_state(conv_last__bias=torch.full((3,), 1e300, dtype=torch.float64))}),
            "conv_last.bias holds non-finite",
        ),
        (safetensors.torch.save(changed_state(), {"residual_scale": "wide"}), "residual_scale='wide'"),
        (safetensors.torch.save(changed_state(), {"residual_scale": "nan"}), "residual_scale='nan'"),
    ],
)
def test_content_that_is_not_a_generator_is_rejected_in_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_generator(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert not Path("unpickled").exists()


def test_paths_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            load_generator(path)
    with pytest.raises(UserError, match=r"g.safetensors: cannot be written"):
        save_generator(network(), tmp_path / "nowhere" / "g.safetensors")
    with pytest.raises(UserError, match=r"g.ckpt: weights are written as"):
        save_generator(network(), tmp_path / "g.ckpt")
