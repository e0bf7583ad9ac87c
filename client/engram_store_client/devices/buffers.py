"""Memory of a device that rows are copied to, used again and again at the same addresses."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from engram_store_client.devices.streams import Event, Streams

_GROWTH = 1.5


@dataclass(eq=False, slots=True)
class DeviceBuffer:
    """Room for one layer's rows of one window."""

    rows: Tensor
    """[capacity, dim] in storage dtype."""
    inverse: Tensor
    """int32 [capacity]"""
    free: Event
    """When nobody computes with it any more."""
    wide: Tensor | None = None
    """[capacity, dim] in the gate's dtype, where that is another one."""

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        parts = (self.rows, self.inverse, *(() if self.wide is None else (self.wide,)))
        return sum(part.numel() * part.element_size() for part in parts)


class DeviceBuffers:
    """As many buffers per layer as windows are outstanding, each as large as it had to be once.

    Args:
        streams: of the device.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._free: dict[int, deque[DeviceBuffer]] = {}
        self.nbytes = 0
        """Of all buffers, lent or free."""

    def take(self, layer: int, rows: Tensor, lookups: int) -> DeviceBuffer:
        """A buffer that `rows` [n, dim] and so many look-ups fit into.

        It may be written to once its `free` is done.
        """
        free = self._free.setdefault(layer, deque())
        # The oldest: the least likely to be waited for.
        old = free.popleft() if free else None
        shape, dtype = rows.shape, rows.dtype
        if old is not None and old.rows.dtype == dtype and old.rows.shape[1] == shape[1]:
            capacity, places = old.rows.shape[0], old.inverse.shape[0]
        else:
            capacity = places = 0
        if old is not None and shape[0] <= capacity and lookups <= places:
            return old
        if old is not None:
            self.nbytes -= old.nbytes
        device = self._streams.device
        # Made by an evaluation in inference mode, it could never be trained with.
        with torch.inference_mode(mode=False):
            size = _grown(capacity, shape[0]), shape[1]
            there = torch.empty(size, dtype=dtype, device=device)
            inverse = torch.empty(_grown(places, lookups), dtype=torch.int32, device=device)
        # What had the new memory before may still be computed with.
        made = DeviceBuffer(there, inverse, self._streams.computed())
        self.nbytes += made.nbytes
        return made

    def widened(self, buffer: DeviceBuffer, n: int, dtype: torch.dtype) -> Tensor:
        """The first n rows in another dtype, on the computing stream; at a fixed address too."""
        if buffer.rows.dtype == dtype:
            return buffer.rows[:n]
        if buffer.wide is None or buffer.wide.dtype != dtype:
            before = buffer.nbytes
            with torch.inference_mode(mode=False):
                buffer.wide = torch.empty_like(buffer.rows, dtype=dtype)
            self.nbytes += buffer.nbytes - before
        return buffer.wide[:n].copy_(buffer.rows[:n])

    def give_back(self, layer: int, buffer: DeviceBuffer) -> None:
        """Nothing that is computed from now on uses it."""
        buffer.free = self._streams.computed()
        self._free[layer].append(buffer)


def _grown(capacity: int, needed: int) -> int:
    """Geometric, so that the largest window is soon reached, and never less than a row."""
    return capacity if capacity and needed <= capacity else max(needed, int(_GROWTH * capacity), 1)
