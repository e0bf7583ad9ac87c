"""Rows as tensors: formats, leaves, gradients on their way back."""

import weakref
from collections.abc import Mapping
from typing import Self

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engram_store.errors import ProtocolError
from engram_store.types import GradientBlock, Inverse, RowBlock, RowDtype, RowIds, TableSpec
from engram_store_client.rows import WindowRows, gradient_block, to_device

CPU = torch.device("cpu")
SPEC = TableSpec(layer=1, rows=10, dim=2, dtype=RowDtype.FLOAT32)


class FakeWindow:
    """Three rows, looked up by one sequence of two tokens with two heads."""

    step: int | None = 0

    def __init__(self) -> None:
        self.block: RowBlock = np.arange(6, dtype=np.float32).reshape(3, 2)
        self.inverse: Inverse = np.array([[[0, 1], [1, 2]]], np.int32)
        self.pushed: list[tuple[int, GradientBlock]] = []
        self.closed = 0

    def row_ids(self, layer: int) -> RowIds:
        return np.arange(3, dtype=np.int32)

    def rows(self, layer: int) -> tuple[RowBlock, Inverse]:
        return self.block, self.inverse

    def ready(self, layer: int) -> bool:
        return True

    def gradient_buffer(self, layer: int) -> NDArray[np.float32]:
        return np.zeros((3, 2), np.float32)

    def push(self, layer: int, gradients: GradientBlock) -> None:
        self.pushed.append((layer, gradients))

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_rows(
    step: int | None = 0, *, zero_table: bool = False, tables: Mapping[int, TableSpec] | None = None
) -> tuple[FakeWindow, WindowRows]:
    """A window and its rows."""
    window = FakeWindow()
    rows = WindowRows(window, tables or {1: SPEC}, step=step, zero_table=zero_table)
    return window, rows


@pytest.mark.parametrize("dtype", RowDtype)
@pytest.mark.parametrize("writeable", [True, False])
def test_rows_arrive_with_their_values_in_every_format(dtype: RowDtype, *, writeable: bool) -> None:
    """bfloat16 travels as bits; read-only memory is fine."""
    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    bits = {
        RowDtype.BFLOAT16: values.bfloat16().view(torch.int16).numpy().view(np.uint16),
        RowDtype.FLOAT16: values.half().numpy(),
        RowDtype.FLOAT32: values.numpy(),
    }[dtype].copy()
    bits.flags.writeable = writeable

    rows, inverse = to_device(
        bits, np.zeros((1, 1, 1), np.int32), rows=dtype, device=CPU, dtype=torch.float32
    )

    assert torch.equal(rows, values)
    assert inverse.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_leave_as_bfloat16_bits_or_float32(dtype: torch.dtype) -> None:
    """Values survive, also of tensors that are not contiguous."""
    gradient = torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=dtype).t()

    block = gradient_block(gradient)

    assert block.dtype == (np.uint16 if dtype == torch.bfloat16 else np.float32)
    assert block.flags.c_contiguous
    values = (
        torch.from_numpy(block.view(np.int16)).view(dtype)
        if block.dtype == np.uint16
        else (torch.from_numpy(block))
    )
    assert torch.equal(values.to(dtype), gradient)


def test_two_runs_of_a_layer_share_one_leaf_and_push_once() -> None:
    """Gradient checkpointing and repeated forward passes add up to one gradient."""
    window, rows = open_rows()

    torch.autograd.backward(
        [rows.lookup(1, CPU, torch.float32).sum(), rows.lookup(1, CPU, torch.float32).sum()]
    )
    pushed = [*rows.push(), *rows.push()]

    assert len(pushed) == len(window.pushed) == 1
    np.testing.assert_array_equal(window.pushed[0][1], [[2, 2], [4, 4], [2, 2]])
    assert rows.backward_calls == 1


def test_a_backward_pass_after_the_push_is_refused() -> None:
    """Its gradient would silently be lost."""
    window, rows = open_rows()
    torch.autograd.backward(rows.lookup(1, CPU, torch.float32).sum())
    list(rows.push())

    with pytest.raises(ProtocolError, match="backward pass reached rows"):
        torch.autograd.backward(rows.lookup(1, CPU, torch.float32).sum())
    np.testing.assert_array_equal(window.pushed[0][1], [[1, 1], [2, 2], [1, 1]])


@pytest.mark.parametrize(("step", "zero_table"), [(None, False), (0, True)])
def test_rows_that_are_not_trained_take_no_gradient(step: int | None, *, zero_table: bool) -> None:
    """A read-only window and the control arm have nothing to push."""
    window, rows = open_rows(step, zero_table=zero_table)

    looked_up = rows.lookup(1, CPU, torch.float32)

    assert not looked_up.requires_grad
    assert bool(looked_up.any()) is not zero_table
    assert [*rows.push()] == window.pushed == []


def test_closing_gives_the_window_back() -> None:
    """The leaves are dropped with it."""
    window, rows = open_rows()
    rows.lookup(1, CPU, torch.float32)

    rows.close()

    assert rows.closed
    assert not rows.used
    assert window.closed == 1


@pytest.mark.parametrize("pushed", [True, False])
def test_rows_are_freed_with_their_window(*, pushed: bool) -> None:
    """Nothing waits for the garbage collector, which does not see cycles through tensors."""
    _window, rows = open_rows()
    looked_up = rows.lookup(1, CPU, torch.float32)
    looked_up.sum().backward()  # type: ignore[no-untyped-call]
    if pushed:
        list(rows.push())
    leaf = weakref.ref(rows._leaves[1].rows)

    rows.close()
    del looked_up

    assert leaf() is None
