"""The table as a parameter: `nn.Embedding(sparse=True)`, trained by `SparseAdam`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.peers.protocol import PeerRows, Traits, as_floats
from engram_store.bench.peers.table import BLOCK_ROWS, PeerTable

_COPIES_IN_TRAINING = 3
"""Weights and the two moments, which SparseAdam keeps for the whole table."""


class TorchEmbedding:
    """All rows in memory as float32, which is what the module and its optimiser are made for."""

    traits = Traits(
        name="nn.Embedding",
        what="torch.nn.Embedding(sparse=True) in float32; trained by torch.optim.SparseAdam",
        module="torch",
        distribution="torch",
        extra="torch",
        every_lookup=True,
    )

    def __init__(self) -> None:
        self._module: Any = None
        self._optimizer: Any = None

    def open(self, table: PeerTable) -> int:
        """Copy the rows, and take a step when there will be training: it makes the moments."""
        import torch

        copies = _COPIES_IN_TRAINING if table.training else 1
        held = table.fitting_rows(4 * table.dim * copies)
        weights, flat = torch.empty(held, table.dim), table.flat()
        for first in range(0, held, BLOCK_ROWS):
            block = as_floats(flat[first : min(first + BLOCK_ROWS, held)])
            weights[first : first + len(block)] = torch.from_numpy(block)
        self._module = torch.nn.Embedding(held, table.dim, sparse=True, _weight=weights)
        if table.training:
            self._optimizer = torch.optim.SparseAdam(self._module.parameters(), lr=0.01)
            self._make_moments()
        return held

    def _make_moments(self) -> None:
        """Memory of the moments is there before a step is timed."""
        no_rows = np.empty(0, np.int64)
        self.train(no_rows, np.empty((0, self._module.embedding_dim), np.float32))
        for state in self._optimizer.state.values():
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].fill_(0)

    def read(self, rows: PeerRows) -> NDArray[np.float32]:
        """The forward pass alone."""
        import torch

        with torch.no_grad():
            answer: NDArray[np.float32] = self._module(torch.from_numpy(rows)).numpy()
        return answer

    def train(self, rows: PeerRows, gradients: NDArray[np.float32]) -> None:
        """Forward, backward, step."""
        import torch

        self._optimizer.zero_grad()
        self._module(torch.from_numpy(rows)).backward(torch.from_numpy(gradients))
        self._optimizer.step()

    def close(self) -> None:
        """Give the memory back."""
        self._module = self._optimizer = None
