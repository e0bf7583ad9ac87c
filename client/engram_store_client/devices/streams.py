"""Copies between the host and one device, beside what the device computes."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in the work of a device."""

    def done(self) -> bool:
        """Whether the device has got there. Waits for nothing."""
        ...

    def wait(self) -> None:
        """Block this thread until it has; other work of the device goes on."""
        ...


class Streams(Protocol):
    """The side streams of one device, beside the stream on which it computes.

    Work is given to them and done later, in order; only `Event.wait` blocks. Memory that takes part
    in a copy has to be left alone until the copy's event is done.
    """

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> Event:
        """Copy to the device.

        Args:
            pairs: (host, there), of the same shape and dtype each.
            after: `computed` at a time since which nobody uses the destinations.

        Returns:
            When all of them are there.
        """
        ...

    def download(self, there: Tensor, host: Tensor) -> Event:
        """Copy what the computing stream has made so far; of one destination the last wins.

        Returns:
            When it is on the host.
        """
        ...

    def computed(self) -> Event:
        """When everything is computed that was asked for until now."""
        ...

    def compute_after(self, event: Event) -> None:
        """Let what is computed from now on wait for an event; this thread does not."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Host memory to download to; None: no more can be pinned."""
        ...
