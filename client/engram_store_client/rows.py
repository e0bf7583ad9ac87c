"""The rows of one window as tensors: out of the store, and their gradients back into it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from engram_store.errors import EngramStoreError, ProtocolError
from engram_store.session import Window
from engram_store.types import GradientBlock, Inverse, RowBlock, RowDtype, TableSpec
from engram_store_client.devices.arrays import (
    gradient_array,
    pushed_dtype,
    row_tensor,
    shared_tensor,
)
from engram_store_client.devices.copies import Copies
from engram_store_client.devices.path import DevicePath, Download, Upload
from engram_store_client.devices.streams import Event


def to_device(
    block: RowBlock, inverse: Inverse, *, rows: RowDtype, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Bring one layer's rows to where the model computes, on the current stream.

    For devices without side streams: a CPU, where nothing is copied that need not be.

    Args:
        block: unique rows [n, dim] in storage dtype.
        inverse: int32 [batch, time, heads].
        rows: number format of `block`.
        device: of the model layer.
        dtype: of the gate's arithmetic.

    Returns:
        Rows as `dtype` [n, dim], which may share memory with `block`, and the inverse.
    """
    host = row_tensor(block, rows)
    # Rows cross to the device in storage dtype and are widened there.
    there = host.to(device).to(dtype)
    if there is host and not block.flags.writeable:
        there = host.clone()
    return there, shared_tensor(inverse).to(device)


def gradient_block(gradient: Tensor) -> GradientBlock:
    """A gradient [n, dim] as the store takes it: bfloat16 as bits in uint16, else float32.

    Memory is shared with `gradient` where that is possible.
    """
    host = gradient.detach().to("cpu", pushed_dtype(gradient.dtype))
    return gradient_array(host.contiguous())


class _Sender:
    """Copies the gradient of one leaf to the host while the backward pass goes on.

    Args:
        window, layer: whose gradient.
        path: of the leaf's device.
        copies: knows whether the window's own memory may be used.
    """

    def __init__(self, window: Window, layer: int, path: DevicePath, copies: Copies) -> None:
        self._window, self._layer = window, layer
        self._path, self._copies = path, copies
        self._room: Tensor | None = None
        self.download: Download | None = None

    def send(self, gradient: Tensor) -> None:
        """Copy what the gradient is by now; a later copy takes the place of an earlier one."""
        if self._room is None:
            self._room = self._path.room(
                self._window, self._layer, gradient, provisional=self._copies.provisional
            )
        # Without pinned memory a copy would hold the backward pass up: it is made by the push.
        if self._room is not None:
            self.download = self._path.download(gradient, self._room)


class _Backward:
    """What backward passes did to one leaf.

    It must not know the leaf: a tensor whose hook leads back to the tensor is never freed.
    """

    def __init__(self, sender: _Sender | None = None) -> None:
        self.calls = 0
        self.sender = sender
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
        if self.sender is not None and rows.grad is not None:
            self.sender.send(rows.grad)

    @property
    def download(self) -> Download | None:
        """The gradient on its way to the host, if it is."""
        return None if self.sender is None else self.sender.download


class _Leaf:
    """Unique rows [n, dim] of one layer, the end of the autograd graph."""

    def __init__(
        self, rows: Tensor, inverse: Tensor, *, trains: bool, sender: _Sender | None = None
    ) -> None:
        self.rows, self.inverse = rows.detach().requires_grad_(trains), inverse
        self.backward = _Backward(sender)
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
        copies: the way to GPUs; None: there are none.
    """

    def __init__(
        self,
        window: Window,
        tables: Mapping[int, TableSpec],
        *,
        step: int | None,
        zero_table: bool = False,
        copies: Copies | None = None,
    ) -> None:
        self.step, self.closed = step, False
        self._window, self._tables, self._zero = window, tables, zero_table
        self._copies = copies
        self._leaves: dict[int, _Leaf] = {}
        self._uploads: dict[int, tuple[DevicePath, Upload]] = {}
        """Rows on GPUs, or on their way there."""

    @property
    def backward_calls(self) -> int:
        """How often a backward pass reached one of the leaves."""
        return sum(leaf.backward.calls for leaf in self._leaves.values())

    @property
    def used(self) -> bool:
        """Whether a forward pass has looked at it."""
        return bool(self._leaves)

    def prefetch(self, layer: int, device: torch.device) -> None:
        """Begin to copy a layer's rows to its GPU, if the store has them; waits for nothing.

        Raises: what `Window.rows` raises.
        """
        path = None if self._copies is None else self._copies.path(device)
        if path is None or layer in self._uploads or self.closed:
            return
        if self._window.ready(layer):
            self._uploads[layer] = path, self._upload(layer, path)

    def lookup(self, layer: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Rows of all heads side by side: `dtype` [batch, time, heads * dim].

        Raises: what `Window.rows` raises.
        """
        leaf = self._leaves.get(layer)
        if leaf is None:
            leaf = self._leaves[layer] = self._open(layer, device, dtype)
        return F.embedding(leaf.inverse, leaf.rows).flatten(-2)

    def _open(self, layer: int, device: torch.device, dtype: torch.dtype) -> _Leaf:
        path = None if self._copies is None else self._copies.path(device)
        sender: _Sender | None = None
        if path is None or self._copies is None:
            block, inverse = self._window.rows(layer)
            spec = self._tables[layer]
            rows, places = to_device(block, inverse, rows=spec.dtype, device=device, dtype=dtype)
        else:
            if layer not in self._uploads:
                self._uploads[layer] = path, self._upload(layer, path)
            path, upload = self._uploads[layer]
            rows, places = path.use(upload, dtype)
            sender = _Sender(self._window, layer, path, self._copies)
        if self._zero:
            return _Leaf(torch.zeros_like(rows), places, trains=False)
        return _Leaf(rows, places, trains=self.step is not None, sender=sender)

    def _upload(self, layer: int, path: DevicePath) -> Upload:
        block, inverse = self._window.rows(layer)
        return path.upload(layer, block, inverse, self._tables[layer].dtype)

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
        # The backward pass came to the last layer first: its copy is done first, too.
        for layer, leaf in reversed(self._leaves.items()):
            if leaf.rows.grad is None:
                continue
            block = self._block(layer, leaf)
            self._window.push(layer, block)
            leaf.backward.pushed, leaf.rows.grad = block, None
            yield block

    def _block(self, layer: int, leaf: _Leaf) -> GradientBlock:
        """A leaf's gradient on the host; waits for its copy, and for nothing else."""
        assert leaf.rows.grad is not None
        download = leaf.backward.download
        if download is None or self._copies is None:
            if layer in self._uploads:
                self._uploads[layer][0].count_pageable()
            return gradient_block(leaf.rows.grad)
        self._copies.wait(download.event)
        return download.block

    def settle(self) -> None:
        """Wait until no copy reads or writes the window's memory."""
        if self._copies is not None:
            for event in self._copying():
                self._copies.wait(event)

    def _copying(self) -> Iterator[Event]:
        for _, upload in self._uploads.values():
            yield upload.event
        for leaf in self._leaves.values():
            if leaf.backward.download is not None:
                yield leaf.backward.download.event

    def close(self) -> None:
        """Give the rows back, once no copy reads them. Closing twice is fine.

        A window that is trained is given back before this returns: the store counts it. Of others
        the memory may follow later (`Copies.poll`).
        """
        copying, uploads = list(self._copying()), self._uploads
        self.closed, self._uploads = True, {}
        self._leaves.clear()
        for path, upload in uploads.values():
            path.end(upload)
        if self._copies is None:
            self._window.close()
            return
        trained = self.step is not None and not self._zero
        self._copies.release(self._window.close, copying, wait=trained)
