"""Pinning: what is registered for a GPU, when, and when not any more. No GPU is needed."""

import gc
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import engram_store
from engram_store.slots import SlotExchange
from engram_store_client.devices import cuda_registrar, host_memory
from engram_store_client.devices.host_memory import HostMemory, host_memory_of
from engram_store_client.devices.pin_advice import Surroundings, advise
from engram_store_client.devices.registrar import NoRegistrar, PinError, pieces
from engram_store_client.transport import connect
from tests.devices import RecordingRegistrar, mapped_file
from tests.pairs import MakeStore

PAGE = 4096


@pytest.fixture
def registrar() -> Iterator[RecordingRegistrar]:
    """One whose rules were kept."""
    registrar = RecordingRegistrar()
    yield registrar
    assert registrar.wrong == []


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are made as for a GPU."""
    monkeypatch.setattr(host_memory, "cuda_is_there", lambda: True)


def test_large_buffers_are_cut_at_their_own_ends() -> None:
    assert pieces(8 * PAGE, 3 * PAGE, 2 * PAGE) == [(8 * PAGE, 2 * PAGE), (10 * PAGE, PAGE)]
    assert pieces(8 * PAGE, PAGE) == [(8 * PAGE, PAGE)]
    assert pieces(PAGE, 0) == []


def test_buffers_are_pinned_while_they_live(registrar: RecordingRegistrar) -> None:
    """Those from before the GPU was used, and those that come later; views keep them."""
    memory = HostMemory()
    early = memory.allocate(3 * PAGE)
    assert not memory.is_pinned(early)
    assert registrar.held == {}

    memory.pin(registrar)
    late = memory.allocate(100)
    view = late[10:20].view(np.uint8)

    assert memory.pinned_bytes == 4 * PAGE
    assert memory.is_pinned(early[5:])
    assert memory.is_pinned(view)
    assert not memory.is_pinned(np.zeros(3))
    del early, late
    assert registrar.let_go == 1
    assert memory.is_pinned(view)
    del view
    assert registrar.held == {}
    assert memory.pinned_bytes == 0


def test_a_range_over_two_registrations_is_not_one_copy(
    registrar: RecordingRegistrar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver takes no copy that spans them, so it is made as if nothing were pinned."""
    monkeypatch.setattr(host_memory, "pieces", lambda a, n: pieces(a, n, PAGE))
    memory = HostMemory()
    memory.pin(registrar)

    buffer = memory.allocate(2 * PAGE)

    assert memory.is_pinned(buffer[:PAGE])
    assert memory.is_pinned(buffer[PAGE:])
    assert not memory.is_pinned(buffer)


def test_a_failed_pin_is_reported_once_and_training_goes_on() -> None:
    """What was pinned of the buffer before is let go; other buffers stay pinned."""
    registrar, memory = RecordingRegistrar(most=4 * PAGE), HostMemory()
    memory.pin(registrar)
    small = memory.allocate(2 * PAGE)

    with pytest.warns(RuntimeWarning, match=r"12,288 bytes .* \(out of memory\).* Probably: "):
        large = memory.allocate(3 * PAGE)
    other = memory.allocate(3 * PAGE)  # no second warning, which would be an error here

    large[:] = other[:] = 1
    assert (memory.pinned_bytes, memory.pageable_bytes) == (2 * PAGE, 6 * PAGE)
    assert memory.is_pinned(small)
    assert not memory.is_pinned(large)
    assert registrar.wrong == []


def test_without_shared_memory_rows_are_pageable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_memory, "shared_pages", refuse)
    memory = HostMemory()

    with pytest.warns(RuntimeWarning, match="no shared memory: No space left"):
        buffer = memory.allocate(PAGE)

    assert buffer.shape == (PAGE,)
    assert not memory.is_pinned(buffer)


def test_memory_of_a_parent_is_not_let_go_by_its_child(
    registrar: RecordingRegistrar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked child drops its copies of the arrays; the registrations are the parent's."""
    memory = HostMemory()
    memory.pin(registrar)
    buffer = memory.allocate(PAGE)
    monkeypatch.setattr("os.getpid", lambda: -1)

    del buffer

    assert registrar.let_go == 0


def test_nothing_is_pinned_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And memory comes from where it came before."""
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: False)
    ))  # fmt: skip
    memory = HostMemory()
    buffer = memory.allocate(PAGE)
    memory.pin(NoRegistrar())

    assert buffer.base is None
    assert (memory.pinned_bytes, memory.pageable_bytes) == (0, 0)


def test_slots_of_both_sides_are_pinned_and_followed(registrar: RecordingRegistrar) -> None:
    """Rows that are received are mapped read-only; a new slot is pinned before it is named."""
    memory = HostMemory()
    memory.pin(registrar)
    channels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    store, trainer = SlotExchange(1 << 30), SlotExchange(1 << 30, on_slot=memory.add)
    store.attach(channels[0])
    trainer.attach(channels[1])
    receiver = threading.Thread(target=trainer.receive)
    receiver.start()

    gradient = trainer.allocate(PAGE)
    views = []
    for length in (PAGE, 5 * PAGE):  # the second one takes the first one's place
        rows = store.allocate(length)
        views.append(trainer.view(store.range_of(rows)))

    assert sorted(registrar.held.values()) == [
        (2 * PAGE, False), (2 * PAGE, True), (6 * PAGE, True)
    ]  # fmt: skip
    assert all(memory.is_pinned(view) for view in (*views, gradient))
    trainer.close()
    store.close()
    receiver.join(5)
    channels[0].close()
    del trainer, receiver, gradient
    gc.collect()
    assert registrar.let_go == 1  # gradients went; rows are still being read
    assert memory.is_pinned(views[1])
    views.clear()
    gc.collect()
    assert registrar.held == {}


def test_only_buffers_of_a_store_are_pinned_never_its_files(
    make_store: MakeStore, registrar: RecordingRegistrar
) -> None:
    """While it trains, and until it is forgotten."""
    session = connect(make_store())
    memory = host_memory_of(session)
    assert memory is not None
    memory.pin(registrar)
    for step in range(2):
        window = session.announce(np.arange(40).reshape(2, 20), step)
        for layer in session.tables:
            room = window.gradient_buffer(layer)
            room[:] = window.rows(layer)[0].shape[0]
            assert memory.is_pinned(window.rows(layer)[0])
            assert memory.is_pinned(window.rows(layer)[1])
            window.push(layer, room)
        session.commit(step, 0.1)
    session.close()

    assert {name.split(" ")[0] for name in registrar.mappings} == {"/memfd:engram-rows"}
    assert registrar.let_go == 0
    del session, window, room
    gc.collect()
    assert registrar.held == {}


def test_memory_of_the_callers_own_is_left_alone(make_store: MakeStore) -> None:
    """Who allocates also pins."""
    path = make_store()
    with connect(path, allocate=lambda size: np.empty(size, np.uint8)) as session:
        assert host_memory_of(session) is None
    with engram_store.open(path) as session:
        assert host_memory_of(session) is None
    assert host_memory_of([]) is None


@pytest.mark.parametrize(
    ("around", "said"),
    [
        (Surroundings(memlock_bytes=8 << 20), r"locked memory is 8,388,608 bytes.*ulimit -l"),
        (Surroundings(memlock_bytes=1, container=True), "--ulimit memlock=-1"),
        (Surroundings(memlock_bytes=None, container=True), "container may hold too little"),
        (Surroundings(memlock_bytes=None, wsl=True), "wslconfig"),
        (Surroundings(memlock_bytes=None, integrated=True), "shares the host's memory"),
        (Surroundings(memlock_bytes=None), "fewer tokens"),
    ],
)
def test_advice_names_the_likely_cause(around: Surroundings, said: str) -> None:
    text = advise(1 << 30, around)

    assert re.search(said, text), text


class FakeRuntime:
    """Stands for libcudart, and for torch's binding of it."""

    def __init__(self, result: int = 0, *, read_only: int = 1, refuses: int = 0) -> None:
        self.result, self.read_only, self.refuses = result, read_only, refuses
        self.pending = 0
        self.registered: list[tuple[int, int, int]] = []
        self.unregistered: list[int] = []

    def cudaHostRegister(self, address: int, length: int, flags: int) -> int:  # noqa: N802
        self.registered.append((address, length, flags))
        self.pending = self.result
        return self.result

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.unregistered.append(address)
        self.pending = self.result
        return self.result

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return f"error {code}"

    def cudaGetLastError(self) -> int:  # noqa: N802
        last, self.pending = self.pending, 0
        return last

    def cudaDeviceGetAttribute(self, value: Any, _attribute: Any, _device: Any) -> int:  # noqa: N802
        value._obj.value = self.read_only
        return self.refuses


def with_runtime(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime, *, found: bool) -> Any:
    """A registrar that calls it."""
    monkeypatch.setattr(cuda_registrar, "_cudart", lambda: runtime)
    monkeypatch.setattr(cuda_registrar, "_runtime", lambda: runtime if found else None)
    monkeypatch.setattr("torch.cuda.device", lambda _device: nullcontext())
    return cuda_registrar.CudaRegistrar(torch.device("cuda", 0))


@pytest.mark.parametrize(("read_only", "flags"), [(False, 1), (True, 9)])
def test_memory_is_pinned_for_all_devices(
    monkeypatch: pytest.MonkeyPatch, flags: int, *, read_only: bool
) -> None:
    """By cudaHostRegisterPortable, and read-only memory by cudaHostRegisterReadOnly too."""
    runtime = FakeRuntime()
    registrar = with_runtime(monkeypatch, runtime, found=True)

    assert registrar.register(PAGE, 2 * PAGE, read_only=read_only)
    registrar.unregister(PAGE)

    assert runtime.registered == [(PAGE, 2 * PAGE, flags)]
    assert runtime.unregistered == [PAGE]


def test_a_failed_registration_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would report it at a kernel that has nothing to do with it."""
    runtime = FakeRuntime(result=2)
    registrar = with_runtime(monkeypatch, runtime, found=True)

    with pytest.raises(PinError, match="cudaHostRegister: error 2"):
        registrar.register(PAGE, PAGE, read_only=False)
    assert runtime.pending == 0
    registrar.unregister(PAGE)
    assert runtime.pending == 0


def test_read_only_memory_needs_a_driver_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked first; where it cannot be asked, trying tells."""
    runtime = FakeRuntime(read_only=0)
    registrar = with_runtime(monkeypatch, runtime, found=True)
    with pytest.raises(PinError, match="read-only"):
        registrar.register(PAGE, PAGE, read_only=True)
    assert runtime.registered == []
    for unsure in (FakeRuntime(read_only=0, refuses=1), None):
        runtime = unsure or FakeRuntime(read_only=0)
        registrar = with_runtime(monkeypatch, runtime, found=unsure is not None)
        assert registrar.register(PAGE, PAGE, read_only=True)


def test_a_forked_child_does_not_talk_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    registrar = with_runtime(monkeypatch, runtime, found=True)
    monkeypatch.setattr("os.getpid", lambda: -1)

    registrar.unregister(PAGE)

    assert runtime.unregistered == []


def test_no_step_waits_for_a_whole_device() -> None:
    """Only for single events: everything else of the card goes on."""
    client = Path(host_memory.__file__).parents[1]
    allowed = "self.event.synchronize()"
    for path in client.rglob("*.py"):
        for line in path.read_text().splitlines():
            waits = "synchronize(" in line or "cudaDeviceSynchronize" in line
            assert not waits or allowed in line, f"{path.name}: {line}"


def test_mapped_memory_is_told_by_its_name() -> None:
    """The eyes of the other tests."""
    buffer = host_memory.shared_pages(PAGE)
    assert "engram-rows" in (mapped_file(buffer.__array_interface__["data"][0]) or "")
    assert mapped_file(0) is None
