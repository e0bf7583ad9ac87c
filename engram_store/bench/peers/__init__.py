"""Other software that holds rows, measured beside the store in the same run.

None of it is needed to run anything but `bench window` and `bench update`, which say what is not
installed. One module per peer; a module imports its library in `open`.
"""

from collections.abc import Callable

from engram_store.bench.peers.fbgemm_tables import FbgemmTables
from engram_store.bench.peers.lmdb_rows import LmdbRows
from engram_store.bench.peers.numpy_mapped import NumpyMapped
from engram_store.bench.peers.protocol import Peer, Traits
from engram_store.bench.peers.table import PeerTable
from engram_store.bench.peers.tensorstore_cached import TensorStoreCached
from engram_store.bench.peers.torch_embedding import TorchEmbedding
from engram_store.bench.peers.torch_mapped import TorchMapped
from engram_store.bench.peers.zarr_chunks import ZarrChunks

PEERS: tuple[Callable[[], Peer], ...] = (
    NumpyMapped,
    TorchEmbedding,
    TorchMapped,
    FbgemmTables,
    LmdbRows,
    TensorStoreCached,
    ZarrChunks,
)
"""In the order of the report."""

__all__ = ["PEERS", "Peer", "PeerTable", "Traits"]
