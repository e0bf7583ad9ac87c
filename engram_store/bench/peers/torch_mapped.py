"""`F.embedding` on a tensor whose memory is a mapped file."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.peers.protocol import PeerRows, Traits
from engram_store.bench.peers.table import PeerTable

_PAGE_VALUES = 2048
"""bfloat16 values of a page."""


class TorchMapped:
    """Rows stay in the file; reading them costs no memory of the table's size."""

    traits = Traits(
        name="mapped F.embedding",
        what="torch.nn.functional.embedding on a bfloat16 tensor of torch.from_file",
        module="torch",
        distribution="torch",
        extra="torch",
        every_lookup=True,
    )

    def __init__(self) -> None:
        self._table: Any = None

    def open(self, table: PeerTable) -> int:
        """Map the file and read a value of every page."""
        import torch

        flat: Any = torch.from_file(
            str(table.rows_file),
            shared=False,
            size=table.rows * table.dim,
            dtype=torch.bfloat16,
        )
        flat.view(torch.int16)[::_PAGE_VALUES].max()
        self._table = flat.view(table.rows, table.dim)
        return table.rows

    def read(self, rows: PeerRows) -> NDArray[np.uint16]:
        """The forward pass; numpy has no bfloat16, so its bits are handed out."""
        import torch

        answer = torch.nn.functional.embedding(torch.from_numpy(rows), self._table)
        bits: NDArray[np.uint16] = answer.view(torch.int16).numpy().view(np.uint16)
        return bits

    def close(self) -> None:
        """Unmap."""
        self._table = None
