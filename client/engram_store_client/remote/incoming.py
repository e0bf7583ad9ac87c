"""Rows that arrive in chunks. A store decides nothing here about how much memory they take."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_store.chunks import Arriving, Chunk
from engram_store.errors import ProtocolError
from engram_store.reuse import ReusedMemory
from engram_store.types import TableSpec
from engram_store.v1 import store_pb2 as pb

_FIELDS = {field.name: field.number for field in pb.Rows.DESCRIPTOR.fields}
ROW_IDS, ROWS, INVERSE = (_FIELDS[name] for name in ("row_ids", "rows", "inverse"))
"""Numbers of the arrays in `Rows`."""
ReceivedArrays = Mapping[int, NDArray[np.uint8]]
"""What came in chunks, by the array's number."""


@dataclass(frozen=True, slots=True)
class WantedRows:
    """What the answer to a read can look like.

    Args:
        spec: of the table.
        inverse_shape: (batch, time, columns) of the window.
    """

    spec: TableSpec
    inverse_shape: tuple[int, ...]

    def check(self, rows: pb.Rows) -> None:
        """Raises: ProtocolError: the arrays are not those of this window."""
        lookups = int(np.prod(self.inverse_shape))
        shape = tuple(rows.row_ids.shape)
        if len(shape) != 1 or not 0 <= shape[0] <= lookups:
            raise ProtocolError(
                f"the store announced row ids of shape {shape}; the window has {lookups} look-ups"
            )
        storage = self.spec.dtype.storage.str
        for name, array, dtype, wanted in (
            ("row ids", rows.row_ids, "<i4", shape),
            ("rows", rows.rows, storage, (*shape, self.spec.dim)),
            ("inverse", rows.inverse, "<i4", self.inverse_shape),
        ):
            if array.dtype != dtype or tuple(array.shape) != wanted:
                raise ProtocolError(
                    f"the store announced {name} as {array.dtype!r} {tuple(array.shape)}; for "
                    f"this window of layer {self.spec.layer} they are {dtype!r} {wanted}"
                )


class IncomingRows:
    """One answer that is on its way; belongs to the thread of its stream.

    Args:
        response: the `Rows` that announced it.
        wanted: what was asked for.
        memory: for the arrays.

    Raises:
        ProtocolError: something else was announced. No memory was taken.
    """

    def __init__(
        self, response: pb.SessionResponse, wanted: WantedRows, memory: ReusedMemory
    ) -> None:
        self.response = response
        rows = response.rows
        wanted.check(rows)
        self._arriving: dict[int, Arriving] = {}
        self.arrays: dict[int, NDArray[np.uint8]] = {}
        """Filled by chunks."""
        for number, array in ((ROW_IDS, rows.row_ids), (ROWS, rows.rows), (INVERSE, rows.inverse)):
            if array.in_chunks:
                size = np.dtype(array.dtype).itemsize * int(np.prod(array.shape))
                self.arrays[number] = memory.take(size)
                self._arriving[number] = Arriving(self.arrays[number], f"array {number} of rows")

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        return all(array.complete for array in self._arriving.values())

    def add(self, chunk: Chunk[pb.RowsChunk]) -> None:
        """Raises: ProtocolError: it does not continue what came before."""
        arriving = self._arriving.get(chunk.header.array)
        if arriving is None:
            raise ProtocolError(
                f"a chunk of array {chunk.header.array} of rows; {sorted(self._arriving)} were "
                "announced in chunks"
            )
        arriving.add(chunk.header.offset, chunk.data)


class IncomingAnswers:
    """Puts the answers of one stream together; what is half there goes when the stream goes."""

    def __init__(self) -> None:
        self._rows: dict[int, IncomingRows] = {}

    def take(
        self,
        response: pb.SessionResponse | Chunk[pb.RowsChunk],
        wanted: WantedRows | None,
        memory: ReusedMemory,
    ) -> tuple[pb.SessionResponse, ReceivedArrays] | None:
        """The whole answer, and what of it came in chunks; None: more of it is to come.

        Args:
            response: as received.
            wanted: of a read, what its answer can look like.
            memory: for chunks.

        Raises:
            ProtocolError: it does not fit what was asked, or what came before.
        """
        number = response.id
        if isinstance(response, Chunk):
            rows = self._rows.pop(number, None)
            if rows is None:
                raise ProtocolError("a chunk of rows that were not announced")
            rows.add(response)
        elif wanted is not None and response.WhichOneof("response") == "rows":
            rows = IncomingRows(response, wanted, memory)
        else:
            self._rows.pop(number, None)
            return response, {}
        if rows.complete:
            return rows.response, rows.arrays
        self._rows[number] = rows
        return None

    def drop(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        self._rows.pop(number, None)
