"""Vector files in safetensors format: reading them, and the checks of 8-bit rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.conformance.comparison import Comparison, Subject
from engram_store.recipes.quantization import (
    bfloat16_bits,
    dequantize_blocks,
    dequantize_scalar,
)

_DTYPES = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # numpy has no bfloat16: the bits
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "BOOL": "?",
}


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a safetensors file; bfloat16 ones as uint16 bits."""
    from safetensors import deserialize

    tensors = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    return {
        name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in tensors
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return dict(file.metadata() or {})


def check_quantization(path: Path) -> Iterator[Comparison]:
    """8-bit rows with block scales and with one scale (kind "quant")."""
    subject = Subject("quant", path.name)
    tensors = read_tensors(path)
    codes = tensors["in.weight_u8"]
    values = dequantize_blocks(codes, tensors["in.scale_u8"])
    yield subject.exact("out.f32", values.view(np.uint32), tensors["out.f32"].view(np.uint32))
    yield subject.exact("out.bf16", bfloat16_bits(values), tensors["out.bf16"])
    scaled = dequantize_scalar(codes, tensors["in.global_scale"].item())
    yield subject.exact("out.global_bf16", scaled, tensors["out.global_bf16"])


def check_tensor_files(path: Path) -> Iterator[Comparison]:
    """What the list says about each safetensors file beside it (kind "tensor_files").

    The library refuses files whose tensors do not fit the shapes and dtypes of their header.
    """
    listed = json.loads(path.read_text("utf-8"))["files"]
    subject = Subject("tensor_files", path.name)
    present = sorted(file.stem for file in path.parent.glob("*.safetensors"))
    yield subject.exact("files", ", ".join(present), ", ".join(sorted(listed)))
    for name, expected in listed.items():
        file = path.parent / f"{name}.safetensors"
        if file.exists():
            read_tensors(file)
            metadata = read_metadata(file)
            as_text = {key: str(value) for key, value in expected.items()}
            yield subject.part(name).exact("metadata", metadata, as_text)
