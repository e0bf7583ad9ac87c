"""A GPU that is none: a registrar that checks its callers, and streams that finish late."""

import mmap
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engram_store_client.devices.registrar import PIECE_BYTES, PinError
from engram_store_client.devices.streams import Event

CPU = torch.device("cpu")
_PATIENCE_SECONDS = 60.0


def mapped_file(address: int) -> str | None:
    """Name of the mapping that an address lies in; None: nothing is mapped there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, *_, rest = line.split(maxsplit=5) if len(line.split()) > 5 else (*line.split(), "")
        start, end = (int(bound, 16) for bound in where.split("-"))
        if start <= address < end:
            return rest
    return None


@dataclass
class RecordingRegistrar:
    """Implements `Registrar` and fails the test that breaks its rules.

    Args:
        most: bytes that can be pinned together.
    """

    most: int | None = None
    held: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """Pinned now: (length, read-only) by address."""
    mappings: list[str] = field(default_factory=list)
    """What the kernel calls the memory that was ever registered."""
    let_go: int = 0
    wrong: list[str] = field(default_factory=list)

    def register(self, address: int, length: int, *, read_only: bool) -> bool:
        self._check(address % mmap.PAGESIZE == 0, f"{address:#x} is not the start of a page")
        self._check(0 < length <= PIECE_BYTES, f"{length} bytes")
        for other, (size, _) in self.held.items():
            apart = address + length <= other or other + size <= address
            self._check(apart, f"{address:#x} overlaps {other:#x}")
        name = mapped_file(address)
        self._check(name is not None, f"{address:#x} is not mapped")
        if self.most is not None and length + sum(n for n, _ in self.held.values()) > self.most:
            raise PinError("out of memory")
        self.held[address] = length, read_only
        self.mappings.append(name or "")
        return True

    def unregister(self, address: int) -> None:
        self._check(address in self.held, f"{address:#x} is not registered")
        self._check(mapped_file(address) is not None, f"{address:#x} is gone already")
        self.held.pop(address, None)
        self.let_go += 1

    def _check(self, fine: bool, problem: str) -> None:
        # Finalizers swallow what they raise.
        if not fine:
            self.wrong.append(problem)


class _Job:
    """One copy of a stream."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.allowed, self.performed = threading.Event(), threading.Event()
        self.known = False
        """Whether the host was told that it is done."""


class LateEvent:
    """Implements `Event`: not done until somebody waits for it, or the test lets it finish."""

    def __init__(self, stream: "_LateStream | None" = None, job: _Job | None = None) -> None:
        self._stream, self.job = stream, job

    def done(self) -> bool:
        return self.job is None or (self.job.known and self.job.performed.is_set())

    def wait(self) -> None:
        self.perform()
        if self.job is not None:
            self.job.known = True

    def perform(self) -> None:
        """Do it now, without the host being told."""
        if self.job is not None and self._stream is not None:
            self._stream.perform(self.job)


def _nothing() -> None:
    """A job that was done."""


class _LateStream:
    """A thread that copies in order, each copy only when it cannot be put off any longer."""

    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, run: Callable[[], None]) -> LateEvent:
        job = _Job(run)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        return LateEvent(self, job)

    def perform(self, last: _Job) -> None:
        with self._changed:
            for job in list(self._jobs):
                job.allowed.set()
                if job is last:
                    break
        assert last.performed.wait(_PATIENCE_SECONDS)

    def finish(self) -> None:
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            self.perform(job)
            job.known = True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs)
                job = self._jobs[0]
            job.allowed.wait()
            job.run()
            job.run = _nothing  # it held the memory that was copied
            with self._changed:
                self._jobs.popleft()
            job.performed.set()
            del job


class LateStreams:
    """Implements `Streams` on a CPU, as late as it is allowed to.

    What is computed is computed at once, so waiting for a copy there does it; the host still
    does not know that it is done.
    """

    def __init__(self, *, pins: bool = True) -> None:
        self._in, self._out = _LateStream(), _LateStream()
        self._pins = pins
        self.uploads = self.downloads = self.own_rooms = 0
        self._known: list[_Job] = []

    @property
    def device(self) -> torch.device:
        return CPU

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> LateEvent:
        assert after.done()

        def run() -> None:
            for host, there in pairs:
                there.copy_(host)

        self.uploads += 1
        return self._count(self._in.add(run))

    def download(self, there: Tensor, host: Tensor) -> LateEvent:
        self.downloads += 1

        def run() -> None:
            host.copy_(there)

        return self._count(self._out.add(run))

    def _count(self, event: LateEvent) -> LateEvent:
        assert event.job is not None
        self._known.append(event.job)
        return event

    def computed(self) -> LateEvent:
        return LateEvent()

    def compute_after(self, event: Event) -> None:
        assert isinstance(event, LateEvent)
        event.perform()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        if not self._pins:
            return None
        self.own_rooms += 1
        return torch.full(shape, float("nan"), dtype=dtype)

    def let_finish(self) -> None:
        """All copies end, and whoever asks is told."""
        self._in.finish()
        self._out.finish()
        for job in self._known:
            job.known = True


@dataclass
class FakeCard:
    """What takes the place of CUDA."""

    streams: LateStreams
    registrar: RecordingRegistrar


def pretend_card(
    monkeypatch: pytest.MonkeyPatch, *, most: int | None = None, pins: bool = True
) -> FakeCard:
    """From now on the CPU is taken for a GPU by memories that are attached.

    Args:
        monkeypatch: takes it back.
        most: bytes of the sessions' memory that can be pinned.
        pins: whether memory of torch can be pinned.
    """
    card = FakeCard(LateStreams(pins=pins), RecordingRegistrar(most))
    devices = "engram_store_client.devices"
    monkeypatch.setattr(f"{devices}.copies.open_streams", lambda _device: card.streams)
    monkeypatch.setattr(f"{devices}.copies.registrar_for", lambda _device: (card.registrar, False))
    monkeypatch.setattr(f"{devices}.host_memory.cuda_is_there", lambda: True)
    return card
