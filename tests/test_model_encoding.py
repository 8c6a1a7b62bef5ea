"""Tensors in .safetensors files: what the library reads is what was encoded."""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

from pipeline.model.encoding import encode_tensors

TENSORS = {
    "step": torch.tensor(7),
    "odd": torch.arange(3, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "weight": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "half": torch.randn(5).half(),
    "brain": torch.randn(5).bfloat16(),
    "double": torch.randn(2, 2).double(),
    "complex": torch.randn(3, dtype=torch.complex64),
    **{
        str(dtype): torch.tensor([1, 2]).to(dtype)
        for dtype in (torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)
    },
    **{str(dtype): torch.tensor([0.5, 2]).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)},
    "empty": torch.zeros(0, 3),
}


def test_the_library_reads_every_dtype_shape_and_layout() -> None:
    read = safetensors.torch.load(bytes(encode_tensors(TENSORS)))
    assert read.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert read[name].dtype == value.dtype, name
        assert read[name].shape == value.shape, name
        given, found = (each.contiguous().reshape(-1).view(torch.uint8) for each in (value, read[name]))
        assert torch.equal(found, given), name


def test_metadata_and_bytes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    metadata = {"b": "é", "a": "1"}
    content = bytes(encode_tensors(TENSORS, metadata))
    backwards = dict(reversed(TENSORS.items()))
    assert bytes(encode_tensors(backwards, dict(reversed(metadata.items())))) == content
    (tmp_path / "x.safetensors").write_bytes(content)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == TENSORS.keys()


def test_no_tensors() -> None:
    assert safetensors.torch.load(bytes(encode_tensors({}))) == {}
