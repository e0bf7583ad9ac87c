"""Rows and gradients over streams that finish late: nothing is used again while it is copied."""

from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from engram_store.errors import ProtocolError
from engram_store.types import GradientBlock, Inverse, RowBlock, RowDtype, RowIds, TableSpec
from engram_store_client.devices.buffers import DeviceBuffers
from engram_store_client.devices.copies import Copies
from engram_store_client.devices.host_memory import HostMemory, assign
from engram_store_client.rows import WindowRows
from tests.devices import CPU, FakeCard, LateEvent, LateStreams, pretend_card

DIM, LAYERS = 2, (1, 5)
TABLES = {n: TableSpec(layer=n, rows=10, dim=DIM, dtype=RowDtype.FLOAT32) for n in LAYERS}
POISON = 7e7


class PoolWindow:
    """Three rows per layer in memory that gets another content as soon as it is released."""

    step: int | None = 0

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self.blocks: dict[int, RowBlock] = {}
        self.rooms: dict[int, GradientBlock] = {}
        self.inverse: Inverse = memory.allocate(16).view(np.int32).reshape(1, 2, 2)
        self.inverse[:] = [[[0, 1], [1, 2]]]
        self.pushed: dict[int, GradientBlock] = {}
        self.closed = 0
        self.there = set(LAYERS)
        for layer in LAYERS:
            self.blocks[layer] = self._array()
            self.blocks[layer] += layer

    def _array(self) -> GradientBlock:
        array: GradientBlock = self._memory.allocate(24).view(np.float32).reshape(3, DIM)
        array[:] = np.arange(6).reshape(3, DIM)
        return array

    def row_ids(self, layer: int) -> RowIds:
        return np.arange(3, dtype=np.int32)

    def ready(self, layer: int) -> bool:
        return layer in self.there

    def rows(self, layer: int) -> tuple[RowBlock, Inverse]:
        self.there.add(layer)
        return self.blocks[layer], self.inverse

    def gradient_buffer(self, layer: int) -> GradientBlock:
        if layer not in self.rooms:
            self.rooms[layer] = self._array()
        return self.rooms[layer]

    def push(self, layer: int, gradients: GradientBlock) -> None:
        self.pushed[layer] = gradients.copy()

    def close(self) -> None:
        self.closed += 1
        for array in (*self.blocks.values(), *self.rooms.values()):
            array[:] = POISON
        self.inverse[:] = 0

    def __enter__(self) -> "PoolWindow":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Bench:
    """A card that is none, and windows for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, pins: bool, most: int | None) -> None:
        self.card: FakeCard = pretend_card(monkeypatch, pins=pins, most=most)
        self.memory = HostMemory()
        assign(self, self.memory)
        self.copies = Copies(self)

    @property
    def streams(self) -> LateStreams:
        return self.card.streams

    def window(self, step: int | None = 0) -> tuple[PoolWindow, WindowRows]:
        window = PoolWindow(self.memory)
        return window, WindowRows(window, TABLES, step=step, copies=self.copies)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Everything can be pinned."""
    bench = Bench(monkeypatch, pins=True, most=None)
    yield bench
    bench.streams.let_finish()
    assert bench.card.registrar.wrong == []


def expected(layer: int) -> torch.Tensor:
    """What the look-ups of a layer are."""
    rows = torch.arange(6.0).reshape(3, DIM) + layer
    return rows[torch.tensor([[[0, 1], [1, 2]]])].flatten(-2)


def test_rows_are_copied_before_their_layer_runs(bench: Bench) -> None:
    """All that are there when the pass begins; the others when they are looked up."""
    window, rows = bench.window()
    window.there = {1}
    for layer in LAYERS:
        rows.prefetch(layer, CPU)
        rows.prefetch(layer, CPU)
    assert bench.streams.uploads == 1
    assert not rows.used

    for layer in LAYERS:
        assert torch.equal(rows.lookup(layer, CPU, torch.float32), expected(layer))
        rows.lookup(layer, CPU, torch.float32)
    assert bench.streams.uploads == 2


def test_a_slot_is_released_when_the_copy_that_reads_it_is_done(bench: Bench) -> None:
    """Of a layer that ran, and of one that was only copied; what was copied is what was there."""
    window, rows = bench.window(step=None)
    rows.prefetch(5, CPU)
    buffer = rows._uploads[5][1].buffer
    rows.lookup(1, CPU, torch.float32)

    rows.close()
    bench.copies.poll()
    assert (rows.closed, window.closed) == (True, 0)

    bench.streams.let_finish()
    bench.copies.poll()
    assert window.closed == 1
    assert torch.equal(buffer.rows[:3], torch.arange(6.0).reshape(3, DIM) + 5)
    assert bench.copies.transfers().late_releases == 1


def test_windows_that_wait_for_their_copies_are_few(bench: Bench) -> None:
    """They take memory and credit of the store: the oldest is waited for."""
    windows = [bench.window(step=None) for _ in range(6)]
    for _, rows in windows:
        rows.lookup(1, CPU, torch.float32)
        rows.close()

    assert [window.closed for window, _ in windows] == [1, 1, 0, 0, 0, 0]
    bench.copies.drain()
    assert all(window.closed == 1 for window, _ in windows)


def test_a_training_window_is_given_back_at_once(bench: Bench) -> None:
    """The store counts it: it would miss its gradient. So its copies are waited for."""
    window, rows = bench.window()
    looked_up = rows.lookup(1, CPU, torch.float32)
    torch.autograd.backward(looked_up.sum())
    room = window.rooms[1]

    rows.close()

    assert window.closed == 1
    bench.streams.let_finish()
    assert (room == POISON).all()  # no copy came after it


def test_a_push_waits_for_its_own_copy_only(bench: Bench) -> None:
    """Gradients cross while backward goes on; the one that came first is pushed first."""
    window, rows = bench.window()
    for layer in LAYERS:
        rows.lookup(layer, CPU, torch.float32)
    for layer in reversed(LAYERS):
        torch.autograd.backward(rows.lookup(layer, CPU, torch.float32).sum() * layer)
    assert bench.streams.downloads == 2
    first, second = (rows._leaves[layer].backward.download for layer in reversed(LAYERS))
    assert first is not None
    assert second is not None

    pushing = rows.push()
    next(pushing)

    assert list(window.pushed) == [5]
    assert first.event.done()
    assert isinstance(second.event, LateEvent)
    assert second.event.job is not None
    assert not second.event.job.performed.is_set()
    list(pushing)
    np.testing.assert_array_equal(window.pushed[1], [[1, 1], [2, 2], [1, 1]])
    np.testing.assert_array_equal(window.pushed[5], [[5, 5], [10, 10], [5, 5]])
    assert bench.copies.transfers().waits == 2


def test_several_backward_passes_push_their_sum(bench: Bench) -> None:
    """Each of them sends the gradient as it is by then, to the same place; the last one counts."""
    window, rows = bench.window()
    for factor in (1.0, 2.0, 4.0):
        looked_up = rows.lookup(1, CPU, torch.float32)
        torch.autograd.backward(looked_up.sum() * factor)

    list(rows.push())

    assert bench.streams.downloads == 3
    np.testing.assert_array_equal(window.pushed[1], [[7, 7], [14, 14], [7, 7]])
    assert window.rooms[1].tobytes() == window.pushed[1].tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_land_where_the_store_reads_them(bench: Bench, dtype: torch.dtype) -> None:
    """In the window's own memory, bfloat16 as bits in its first half, others as float32."""
    window, rows = bench.window()
    torch.autograd.backward(rows.lookup(1, CPU, dtype).sum() * 3)

    (block,) = rows.push()

    bits = dtype == torch.bfloat16
    assert block.dtype == (np.uint16 if bits else np.float32)
    assert block.__array_interface__["data"] == window.rooms[1].__array_interface__["data"]
    values = torch.from_numpy(block.view(np.int16)).view(dtype) if bits else torch.tensor(block)
    assert torch.equal(values.float(), torch.tensor([[3.0, 3], [6, 6], [3, 3]]))
    assert bench.streams.own_rooms == 0


def test_memory_that_the_store_may_take_back_is_not_written_to(bench: Bench) -> None:
    """While a commit is under way that fails, it closes windows by itself."""
    window, rows = bench.window()
    under_way: Future[None] = Future()
    bench.copies.commit = under_way
    assert bench.copies.provisional
    torch.autograd.backward(rows.lookup(1, CPU, torch.float32).sum())

    list(rows.push())

    assert window.rooms == {}
    assert bench.streams.own_rooms == 1
    under_way.set_exception(OSError())
    assert bench.copies.provisional
    bench.copies.commit = Future()
    bench.copies.commit.set_result(None)
    assert not bench.copies.provisional
    np.testing.assert_array_equal(window.pushed[1], [[1, 1], [2, 2], [1, 1]])


@pytest.mark.parametrize(("pins", "downloads"), [(True, 1), (False, 0)])
def test_without_pinned_memory_of_the_session(
    monkeypatch: pytest.MonkeyPatch, downloads: int, *, pins: bool
) -> None:
    """Gradients cross through torch's pinned memory, or if there is none, at the push."""
    bench = Bench(monkeypatch, pins=pins, most=0)
    window, rows = bench.window()
    with pytest.warns(RuntimeWarning, match="could not be pinned"):
        looked_up = rows.lookup(1, CPU, torch.float32)
    torch.autograd.backward(looked_up.sum())

    list(rows.push())

    np.testing.assert_array_equal(window.pushed[1], [[1, 1], [2, 2], [1, 1]])
    assert bench.streams.downloads == downloads
    transfers = bench.copies.transfers()
    assert (transfers.copies, transfers.pageable_copies) == (2, 2 - downloads)
    assert transfers.pageable_bytes > 0


def test_memory_nobody_knows_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that was opened past `connect` trains all the same."""
    pretend_card(monkeypatch)
    copies = Copies(object())
    rows = WindowRows(PoolWindow(HostMemory()), TABLES, step=0, copies=copies)

    with pytest.warns(RuntimeWarning, match=r"not known.*engram_store_client.connect"):
        looked_up = rows.lookup(1, CPU, torch.float32)

    assert torch.equal(looked_up, expected(1))
    assert copies.transfers().pageable_copies == 1


def test_a_backward_pass_after_the_push_is_refused(bench: Bench) -> None:
    _, rows = bench.window()
    torch.autograd.backward(rows.lookup(1, CPU, torch.float32).sum())
    list(rows.push())

    with pytest.raises(ProtocolError, match="backward pass reached rows"):
        torch.autograd.backward(rows.lookup(1, CPU, torch.float32).sum())
    assert bench.streams.downloads == 1


def test_addresses_on_the_device_stay(bench: Bench) -> None:
    """One buffer per outstanding window and layer; they grow by half as much at least."""
    buffers = DeviceBuffers(bench.streams)
    rows = torch.zeros(10, DIM)
    first, second = buffers.take(1, rows, 40), buffers.take(1, rows[:3], 8)
    assert first.rows.data_ptr() != second.rows.data_ptr()
    assert buffers.take(2, rows, 4).rows.data_ptr() not in (
        first.rows.data_ptr(), second.rows.data_ptr()
    )  # fmt: skip

    buffers.give_back(1, first)
    buffers.give_back(1, second)
    assert buffers.take(1, rows[:7], 30) is first
    grown = buffers.take(1, rows[:4], 9)

    assert grown is not second
    assert (len(grown.rows), len(grown.inverse)) == (4, 12)
    wide = buffers.widened(first, 7, torch.float64)
    assert wide.data_ptr() == buffers.widened(first, 2, torch.float64).data_ptr()
    assert buffers.widened(first, 7, torch.float32).data_ptr() == first.rows.data_ptr()
    held = 10 * DIM * (4 + 8) + 40 * 4 + 4 * DIM * 4 + 12 * 4 + 10 * DIM * 4 + 4 * 4
    assert buffers.nbytes == held


def test_a_step_without_rows_crosses_too(bench: Bench) -> None:
    """No unique rows: nothing to copy back."""
    window, rows = bench.window()
    window.blocks[1] = np.zeros((0, DIM), np.float32)
    window.inverse = np.zeros((1, 0, 2), np.int32)

    torch.autograd.backward(rows.lookup(1, CPU, torch.float32).sum())
    list(rows.push())

    assert window.pushed[1].shape == (0, DIM)
    assert bench.streams.downloads == 0
