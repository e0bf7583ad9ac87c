"""Arrays of the store as tensors, and tensors as the store takes them. No memory is copied."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_store.types import GradientBlock, RowBlock, RowDtype


class _Writable:
    """Shows a read-only array as a writable one: torch knows no read-only tensors.

    Whoever writes to it all the same is stopped by the memory itself, where that is read-only.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def shared_tensor(array: NDArray[Any]) -> Tensor:
    """Share an array's memory, which must not be written to if it is read-only."""
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


def row_tensor(block: RowBlock, rows: RowDtype) -> Tensor:
    """Rows [n, dim] in storage dtype as a tensor of that dtype."""
    if rows is RowDtype.BFLOAT16:
        return shared_tensor(block.view(np.int16)).view(torch.bfloat16)
    return shared_tensor(block)


def gradient_array(host: Tensor) -> GradientBlock:
    """A gradient [n, dim] on the host, bfloat16 or float32, as the store takes it."""
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(np.uint16)
    return host.numpy()


def gradient_tensor(room: NDArray[np.float32], dtype: torch.dtype) -> Tensor:
    """A window's room for a gradient, float32 [n, dim], as room for one of `dtype`.

    bfloat16 takes the first half.
    """
    if dtype == torch.bfloat16:
        half = room.reshape(-1).view(np.int16)[: room.size].reshape(room.shape)
        return torch.from_numpy(half).view(torch.bfloat16)
    return torch.from_numpy(room)


def pushed_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype a gradient of `dtype` leaves for the store."""
    return dtype if dtype == torch.bfloat16 else torch.float32
