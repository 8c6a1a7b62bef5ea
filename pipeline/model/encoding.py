"""Encodes tensors as a .safetensors file without keeping other threads from running.

The library's own function holds Python's global lock while it copies all bytes: a quarter of a second for a training
state at the paper's size, in which a GPU's next steps are not launched.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64",
    torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> memoryview:
    """The content of a .safetensors file: row-major tensors, the widest dtypes first, then by name.

    Equal tensors and metadata give equal bytes. The format: 8 bytes with the header's length, a header in JSON, the
    tensors' bytes (github.com/huggingface/safetensors).

    Args:
        tensors: on the CPU, by name, of the dtypes above.
        metadata: entries of the header.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        value, start = tensors[name], end
        end += value.nbytes
        header[name] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    content = torch.empty(start + end, dtype=torch.uint8)  # a bytearray would be filled with zeros first
    content[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    for name in names:
        value = tensors[name]
        content[start : start + value.nbytes].view(value.dtype).view(value.shape).copy_(value)
        start += value.nbytes
    return content.numpy().data
