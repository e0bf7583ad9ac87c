"""Every copy of one memory: who is on the way, and windows that may not be released yet."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from engram_store_client.devices.choice import open_streams, registrar_for
from engram_store_client.devices.host_memory import HostMemory, host_memory_of
from engram_store_client.devices.path import CopyCounts, DevicePath
from engram_store_client.devices.streams import Event

_MOST_LATE = 4
"""Windows whose release waits for copies; they take memory and credit of the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfers:
    """How rows and gradients travel to and from GPUs: counters since `attach`, never live.

    All zero on a CPU, where nothing is copied.
    """

    pinned_bytes: int
    """Host memory of the session that is registered with CUDA."""
    pageable_bytes: int
    """Host memory that could not be registered; a warning has said why."""
    device_bytes: int
    """Buffers on the devices: grows with the largest window, never with a table."""
    copies: int
    """Of one layer's rows to a device, or of its gradient back."""
    pageable_copies: int
    """Copies from or to memory that is not pinned: they do not overlap with computing. Many, and no
    `pageable_bytes`: the session's memory is not known here (see docs/gpu.md)."""
    waits: int
    """How often the trainer's thread had to wait for a copy: normally once for each gradient that
    came last in a step."""
    late_releases: int
    """Windows that were read by a copy when they were closed, and were released after it."""


class Copies:
    """The devices of one memory; belongs to the thread that trains.

    Args:
        session: whose windows are copied.
    """

    def __init__(self, session: Any) -> None:
        self._host: HostMemory | None = host_memory_of(session)
        self.commit: Future[Any] | None = None
        """The last commit that was left to the background; None: nobody asks what came of it."""
        self.counts = CopyCounts()
        self._paths: dict[torch.device, DevicePath | None] = {}
        self._late: deque[tuple[Callable[[], None], list[Event]]] = deque()

    @property
    def provisional(self) -> bool:
        """Whether windows have rows that are undone if a commit fails.

        The store closes them by itself then, and uses their memory for others.
        """
        commit = self.commit
        return commit is not None and (not commit.done() or commit.exception() is not None)

    def path(self, device: torch.device) -> DevicePath | None:
        """The way to a device; None: nothing has to be copied, or torch copies it."""
        try:
            return self._paths[device]
        except KeyError:
            path = self._paths[device] = self._open(device)
            return path

    def _open(self, device: torch.device) -> DevicePath | None:
        streams = open_streams(device)
        if streams is None:
            return None
        host = self._host
        if host is None:
            warnings.warn(
                f"rows go to {streams.device} by pageable copies, which do not overlap with "
                "computing: the memory of this session is not known. Open it with "
                "engram_store_client.connect(), without an `allocate` of your own",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            registrar, integrated = registrar_for(streams.device)
            host.pin(registrar, integrated=integrated)
        return DevicePath(streams, _never if host is None else host.is_pinned, self.counts)

    def wait(self, event: Event) -> None:
        """Wait for a copy."""
        if not event.done():
            self.counts.waits += 1
            event.wait()

    def release(self, close: Callable[[], None], reading: Iterable[Event], *, wait: bool) -> None:
        """Close a window once the copies that read it are done.

        Args:
            close: gives its memory back to the store.
            reading: ends of those copies.
            wait: the store must hear of it now.
        """
        left = [event for event in reading if not event.done()]
        if left and not wait:
            self.counts.late_releases += 1
            self._late.append((close, left))
            if len(self._late) > _MOST_LATE:
                self._release_oldest()
            return
        for event in left:
            self.wait(event)
        close()

    def poll(self) -> None:
        """Release the windows that may be released by now; waits for nothing."""
        while self._late and all(event.done() for event in self._late[0][1]):
            self._late.popleft()[0]()

    def drain(self) -> None:
        """Release all of them; waits for the copies that read them."""
        while self._late:
            self._release_oldest()

    def _release_oldest(self) -> None:
        close, reading = self._late.popleft()
        for event in reading:
            self.wait(event)
        close()

    def transfers(self) -> Transfers:
        """See `Transfers`."""
        host, counts = self._host, self.counts
        paths = [path for path in self._paths.values() if path is not None]
        return Transfers(
            pinned_bytes=0 if host is None else host.pinned_bytes,
            pageable_bytes=0 if host is None else host.pageable_bytes,
            device_bytes=sum(path.buffers.nbytes for path in paths),
            copies=counts.copies,
            pageable_copies=counts.pageable,
            waits=counts.waits,
            late_releases=counts.late_releases,
        )


def _never(_array: object) -> bool:
    return False
