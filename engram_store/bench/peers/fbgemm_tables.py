"""FBGEMM's embedding tables on the processor: what production recommenders train with."""

import importlib
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.peers.protocol import PeerRows, Traits, as_floats
from engram_store.bench.peers.table import BLOCK_ROWS, PeerTable

_PACKAGE = "fbgemm_gpu"


def _modules() -> tuple[Any, ...]:
    """Of the package: training, names of places and poolings, names of optimisers."""
    names = (
        "split_table_batched_embeddings_ops_training",
        "split_table_batched_embeddings_ops_common",
        "split_embedding_configs",
    )
    with warnings.catch_warnings():
        # It warns of parts of its own that its wheel was built without.
        warnings.simplefilter("ignore")
        return tuple(importlib.import_module(f"{_PACKAGE}.{name}") for name in names)


class FbgemmTables:
    """Rows in memory as float32, no pooling; backward applies the update by itself."""

    traits = Traits(
        name="FBGEMM",
        what="table-batched embedding on the processor, float32, row-wise Adagrad in backward",
        module=_PACKAGE,
        distribution="fbgemm-gpu-cpu",
        every_lookup=True,
    )

    def __init__(self) -> None:
        self._module: Any = None

    def open(self, table: PeerTable) -> int:
        """Copy the rows into a table in memory."""
        import torch

        training, common, configs = _modules()
        held = table.fitting_rows(4 * table.dim)
        place, device = common.EmbeddingLocation.HOST, training.ComputeDevice.CPU
        self._module = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(held, table.dim, place, device)],
            optimizer=configs.EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            pooling_mode=common.PoolingMode.NONE,
            learning_rate=0.01,
            eps=1e-8,
        )
        weights, flat = self._module.split_embedding_weights()[0], table.flat()
        for first in range(0, held, BLOCK_ROWS):
            block = as_floats(flat[first : min(first + BLOCK_ROWS, held)])
            weights[first : first + len(block)] = torch.from_numpy(block)
        return held

    def _forward(self, rows: PeerRows) -> Any:
        import torch

        return self._module(torch.from_numpy(rows), torch.arange(rows.size + 1))

    def read(self, rows: PeerRows) -> NDArray[np.float32]:
        """The forward pass alone."""
        import torch

        with torch.no_grad():
            answer: NDArray[np.float32] = self._forward(rows).numpy()
        return answer

    def train(self, rows: PeerRows, gradients: NDArray[np.float32]) -> None:
        """Forward and backward; the optimiser is part of the latter."""
        import torch

        self._forward(rows).backward(torch.from_numpy(gradients))

    def close(self) -> None:
        """Give the memory back."""
        self._module = None
