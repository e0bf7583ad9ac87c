"""Side streams of a CUDA device. Nothing here ever waits for the whole device."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from engram_store_client.devices.streams import Event


class CudaEvent:
    """Implements `Event`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # A thread that waits sleeps: the store works on the same cores.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def done(self) -> bool:
        """See `Event.done`."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """See `Event.wait`."""
        self.event.synchronize()


class CudaStreams:
    """Implements `Streams`: one stream each way, because a card copies both ways at once.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._out: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """See `Streams.device`."""
        return self._device

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> CudaEvent:
        """See `Streams.upload`."""
        assert isinstance(after, CudaEvent)
        self._in.wait_event(after.event)
        with torch.cuda.stream(self._in):
            for host, there in pairs:
                there.copy_(host, non_blocking=True)
        return CudaEvent(self._in)

    def download(self, there: Tensor, host: Tensor) -> CudaEvent:
        """See `Streams.download`."""
        self._out.wait_event(self.computed().event)
        with torch.cuda.stream(self._out):
            host.copy_(there, non_blocking=True)
        return CudaEvent(self._out)

    def computed(self) -> CudaEvent:
        """See `Streams.computed`."""
        return CudaEvent(torch.cuda.current_stream(self._device))

    def compute_after(self, event: Event) -> None:
        """See `Streams.compute_after`."""
        assert isinstance(event, CudaEvent)
        torch.cuda.current_stream(self._device).wait_event(event.event)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """See `Streams.pinned`."""
        with contextlib.suppress(RuntimeError):
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return None
