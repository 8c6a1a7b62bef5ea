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
    "count": torch.tensor([1, 2], dtype=torch.int32),
    "empty": torch.zeros(0, 3),
}


def test_the_library_reads_every_dtype_shape_and_layout() -> None:
    read = safetensors.torch.load(bytes(encode_tensors(TENSORS)))
    assert read.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert read[name].dtype == value.dtype, name
        assert torch.equal(read[name], value), name


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
