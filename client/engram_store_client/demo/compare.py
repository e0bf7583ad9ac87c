"""Whether two trainings are equal, bit by bit."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from engram_store_client.checkpoint import DENSE_FILE
from engram_store_client.demo.memory import OPTIMIZER_FILE
from engram_store_client.demo.tables import Block


def different_losses(
    losses: Mapping[int, Sequence[float]], reference: Sequence[float]
) -> list[str]:
    """Every step of all trainers; a step that was repeated counts each time."""
    return [
        f"loss of step {step}"
        for step, values in losses.items()
        if any(value != reference[step] for value in values)
    ]


def different_dense(ours: Path, theirs: Path) -> list[str]:
    """Gates and their optimiser, of two checkpoints' directories."""
    a, b = _dense(ours), _dense(theirs)
    return [
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or not same_bits(a[name], b[name])
    ]


def _dense(directory: Path) -> dict[str, NDArray[Any]]:
    tensors = load_file(directory / DENSE_FILE)
    for number, state in torch.load(directory / OPTIMIZER_FILE)["state"].items():
        tensors |= {f"optimizer {number} {name}": tensor for name, tensor in state.items()}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def different_tables(ours: Iterable[Block], theirs: Iterable[Block]) -> list[str]:
    """Rows and optimiser state of all tables. Raises: ValueError when one has more tables."""
    found = [
        f"{what} of layer {layer}"
        for (layer, *a), (_, *b) in zip(ours, theirs, strict=True)
        for what, block, other in zip(("rows", "state"), a, b, strict=True)
        if not same_bits(block, other)
    ]
    return list(dict.fromkeys(found))  # a large table comes in several blocks


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal as bytes: -0.0 is not 0.0, a NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
