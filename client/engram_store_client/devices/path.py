"""The way of rows to one device, and of their gradients back."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_store.session import Window
from engram_store.types import GradientBlock, Inverse, RowBlock, RowDtype
from engram_store_client.devices.arrays import (
    gradient_array,
    gradient_tensor,
    pushed_dtype,
    row_tensor,
    shared_tensor,
)
from engram_store_client.devices.buffers import DeviceBuffer, DeviceBuffers
from engram_store_client.devices.streams import Event, Streams


@dataclass(slots=True)
class CopyCounts:
    """What happened on the way; counted by `DevicePath` and `Copies`."""

    copies: int = 0
    pageable: int = 0
    waits: int = 0
    late_releases: int = 0


@dataclass(eq=False, slots=True)
class Upload:
    """One layer's rows on their way to a device, and there until `end`."""

    layer: int
    buffer: DeviceBuffer
    event: Event
    shape: tuple[int, ...]
    """Of the inverse."""
    n: int
    """Unique rows."""
    source: tuple[RowBlock, Inverse]
    """What is read meanwhile."""


@dataclass(eq=False, slots=True)
class Download:
    """A gradient on its way to the host."""

    host: Tensor
    event: Event
    source: Tensor
    """What is read meanwhile."""

    @property
    def block(self) -> GradientBlock:
        """What the store takes, once the event is done."""
        return gradient_array(self.host)


@dataclass(eq=False)
class DevicePath:
    """Copies beside computing, for one session and one device.

    Args:
        streams: of the device.
        is_pinned: whether a copy from or to an array leaves this thread alone.
        counts: where to count.
    """

    streams: Streams
    is_pinned: Callable[[NDArray[np.generic]], bool]
    counts: CopyCounts
    buffers: DeviceBuffers = field(init=False)
    own_room: bool = field(init=False, default=False)
    """Whether gradients go to memory of ours, because the session's is not pinned."""

    def __post_init__(self) -> None:
        self.buffers = DeviceBuffers(self.streams)

    def upload(self, layer: int, block: RowBlock, inverse: Inverse, rows: RowDtype) -> Upload:
        """Begin to copy a layer's rows [n, dim] and inverse, as they are stored."""
        host = row_tensor(block, rows)
        buffer = self.buffers.take(layer, host, inverse.size)
        n = len(host)
        pairs = [
            (host, buffer.rows[:n]),
            (shared_tensor(inverse).view(-1), buffer.inverse[: inverse.size]),
        ]
        self._count(self.is_pinned(block) and self.is_pinned(inverse))
        event = self.streams.upload(pairs, buffer.free)
        return Upload(layer, buffer, event, inverse.shape, n, (block, inverse))

    def use(self, upload: Upload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows as `dtype` [n, dim] and the inverse, for what is computed from now on."""
        self.streams.compute_after(upload.event)
        rows = self.buffers.widened(upload.buffer, upload.n, dtype)
        size = int(np.prod(upload.shape))
        return rows, upload.buffer.inverse[:size].view(upload.shape)

    def end(self, upload: Upload) -> None:
        """Nothing that is computed from now on uses the rows."""
        # Also of rows that nobody used: memory that is given up must not be written to any more.
        self.streams.compute_after(upload.event)
        self.buffers.give_back(upload.layer, upload.buffer)

    def download(self, gradient: Tensor, host: Tensor) -> Download:
        """Begin to copy a gradient [n, dim] to the host, in the dtype of `host`."""
        source = gradient.detach().to(host.dtype).contiguous()
        self._count(pinned=True)
        return Download(host, self.streams.download(source, host), source)

    def room(
        self, window: Window, layer: int, gradient: Tensor, *, provisional: bool
    ) -> Tensor | None:
        """Pinned host memory for a gradient [n, dim]; None: there is none.

        Args:
            window, layer: whose gradient.
            gradient: its shape and dtype.
            provisional: the store may close the window by itself and use its memory again.
        """
        if not gradient.numel():
            return None
        dtype = pushed_dtype(gradient.dtype)
        if not (provisional or self.own_room):
            array = window.gradient_buffer(layer)
            if self.is_pinned(array):
                return gradient_tensor(array, dtype)
            self.own_room = True
        return self.streams.pinned(tuple(gradient.shape), dtype)

    def count_pageable(self) -> None:
        """A copy was made that nothing overlapped with."""
        self._count(pinned=False)

    def _count(self, pinned: bool) -> None:
        self.counts.copies += 1
        self.counts.pageable += not pinned
