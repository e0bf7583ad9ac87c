"""The rows of one window as tensors: out of the store, and their gradients back into it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from engram_store.errors import EngramStoreError, ProtocolError
from engram_store.session import Window
from engram_store.types import GradientBlock, Inverse, RowBlock, RowDtype, TableSpec


def to_device(
    block: RowBlock, inverse: Inverse, *, rows: RowDtype, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Bring one layer's rows to where the model computes.

    The only place where rows change devices. It copies on the current stream.

    Args:
        block: unique rows [n, dim] in storage dtype.
        inverse: int32 [batch, time, heads].
        rows: number format of `block`.
        device: of the model layer.
        dtype: of the gate's arithmetic.

    Returns:
        Rows as `dtype` [n, dim], which may share memory with `block`, and the inverse.
    """
    if rows is RowDtype.BFLOAT16:
        host = _tensor(block.view(np.int16)).view(torch.bfloat16)
    else:
        host = _tensor(block)
    # Rows cross to the device in storage dtype and are widened there.
    there = host.to(device).to(dtype)
    if there is host and not block.flags.writeable:
        there = host.clone()
    return there, _tensor(inverse).to(device)


class _Writable:
    """Shows a read-only array as a writable one: torch knows no read-only tensors.

    Whoever writes to it all the same is stopped by the memory itself, where that is read-only.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _tensor(array: NDArray[Any]) -> Tensor:
    """Share an array's memory, which must not be written to if it is read-only."""
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


def gradient_block(gradient: Tensor) -> GradientBlock:
    """A gradient [n, dim] as the store takes it: bfloat16 as bits in uint16, else float32.

    Memory is shared with `gradient` where that is possible.
    """
    if gradient.dtype == torch.bfloat16:
        bits = gradient.detach().cpu().contiguous().view(torch.int16)
        return bits.numpy().view(np.uint16)
    return gradient.detach().to("cpu", torch.float32).contiguous().numpy()


class _Backward:
    """What backward passes did to one leaf.

    It must not know the leaf: a tensor whose hook leads back to the tensor is never freed.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.pushed: GradientBlock | None = None
        """Kept because the store may read it until the commit."""

    def __call__(self, rows: Tensor) -> None:
        """Runs after each backward pass that reached the rows."""
        self.calls += 1
        if self.pushed is not None:
            rows.grad = None
            raise ProtocolError(
                "a backward pass reached rows whose gradient the store already has; call "
                "backward() before clip_grad_norm_() and commit()"
            )


class _Leaf:
    """Unique rows [n, dim] of one layer, the end of the autograd graph."""

    def __init__(self, rows: Tensor, inverse: Tensor, *, trains: bool) -> None:
        self.rows, self.inverse = rows.detach().requires_grad_(trains), inverse
        self.backward = _Backward()
        if trains:
            self.rows.register_post_accumulate_grad_hook(self.backward)  # type: ignore[no-untyped-call]


class WindowRows:
    """One window's rows as autograd leaves, one per layer.

    A layer that is run again (gradient checkpointing, a second forward pass over the same
    batch) sees the same leaf, so its gradient is complete once all backward passes are done.

    Args:
        window: the store's side.
        tables: by layer.
        step: whose commit takes the gradients; None: nothing is trained.
        zero_table: use zeros instead of the rows, and never push.
    """

    def __init__(
        self,
        window: Window,
        tables: Mapping[int, TableSpec],
        *,
        step: int | None,
        zero_table: bool = False,
    ) -> None:
        self.step, self.closed = step, False
        self._window, self._tables, self._zero = window, tables, zero_table
        self._leaves: dict[int, _Leaf] = {}

    @property
    def backward_calls(self) -> int:
        """How often a backward pass reached one of the leaves."""
        return sum(leaf.backward.calls for leaf in self._leaves.values())

    @property
    def used(self) -> bool:
        """Whether a forward pass has looked at it."""
        return bool(self._leaves)

    def lookup(self, layer: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Rows of all heads side by side: `dtype` [batch, time, heads * dim].

        Raises: what `Window.rows` raises.
        """
        leaf = self._leaves.get(layer)
        if leaf is None:
            leaf = self._leaves[layer] = self._open(layer, device, dtype)
        return F.embedding(leaf.inverse, leaf.rows).flatten(-2)

    def _open(self, layer: int, device: torch.device, dtype: torch.dtype) -> _Leaf:
        block, inverse = self._window.rows(layer)
        spec = self._tables[layer]
        rows, places = to_device(block, inverse, rows=spec.dtype, device=device, dtype=dtype)
        if self._zero:
            return _Leaf(torch.zeros_like(rows), places, trains=False)
        return _Leaf(rows, places, trains=self.step is not None)

    def awaits_gradient(self, layer: int) -> bool:
        """Whether the layer was run and no backward pass came back yet."""
        leaf = self._leaves.get(layer)
        return leaf is not None and leaf.rows.requires_grad and not leaf.backward.calls

    def closed_by_store(self) -> bool:
        """Whether the store closed the window, as it does when its rows came to nothing."""
        try:
            self._window.row_ids(next(iter(self._tables)))
        except EngramStoreError:
            return True
        return False

    def push(self) -> Iterator[GradientBlock]:
        """Hand over every gradient that is there and was not handed over before, one by one.

        Raises: what `Window.push` raises; that layer's gradient stays here then.
        """
        for layer, leaf in self._leaves.items():
            if leaf.rows.grad is None:
                continue
            block = gradient_block(leaf.rows.grad)
            self._window.push(layer, block)
            leaf.backward.pushed, leaf.rows.grad = block, None
            yield block

    def close(self) -> None:
        """Give the rows back. Closing twice is fine."""
        self.closed = True
        self._leaves.clear()
        self._window.close()
