"""Rows that the next window waits for are updated first, and handed out before the commit is done.

While a commit is applied in the background (`Session.begin_commit`), the trainer is already on its
way through the layers below the table. The first window of the next step was staged, so it only
lacks the rows that this commit changes: those are computed first, copied from the memtable into the
window, and the window is ready although most of the commit is still to be done. The order in which
rows are updated changes nothing: each depends on nothing but itself.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engram_store.engine.extents import as_bytes
from engram_store.gathering import Gatherer
from engram_store.kernels import rows as row_kernels
from engram_store.kernels.urgent import wanted_first
from engram_store.types import RowBlock, RowIds

if TYPE_CHECKING:
    from engram_store.window import LayerLookup


class EarlyWindow:
    """One table's part of a staged window, about to get its rows from a commit.

    Args:
        gatherer: of the thread that computes the commit.
        lookup: staged, with an index of its rows.
        hand_out: gives the window its rows, of which so many were copied again, or tells it why
            there are none.
    """

    def __init__(
        self,
        gatherer: Gatherer,
        lookup: "LayerLookup",
        hand_out: Callable[[int, BaseException | None], None],
    ) -> None:
        self._gatherer, self._lookup, self._hand_out = gatherer, lookup, hand_out
        self._targets = np.empty(0, np.int32)

    def sort(self, rows: RowIds) -> tuple[NDArray[np.int32], int]:
        """Order in which the rows of a commit (int32 [n], distinct) are updated.

        Returns:
            int32 [n] positions in `rows`, and how many of the first ones the window wants.
        """
        order = np.empty(rows.size, np.int32)
        wanted, index = self._lookup.found.result()[0], self._lookup.index
        self._targets = np.empty(min(rows.size, wanted.size), np.int32)
        count = wanted_first(rows, wanted, index, order, self._targets)
        return order, int(count)

    def hand_over(self, new: RowBlock) -> None:
        """The rows that it wants, storage dtype [count, dim] in the order of `sort`."""
        try:
            # What commits before this one changed, if that was not done ahead.
            again = self._gatherer.complete(self._lookup)
            assert self._lookup.block is not None
            row_bytes = new.strides[0]
            addresses = new.ctypes.data + np.arange(len(new), dtype=np.int64) * row_bytes
            targets = self._targets[: len(new)]
            row_kernels.scatter_rows(addresses, targets, row_bytes, as_bytes(self._lookup.block))
        except BaseException as error:
            self._hand_out(0, error)
        else:
            self._hand_out(again + len(new), None)
