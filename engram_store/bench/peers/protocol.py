"""What a peer has to be able to do."""

import importlib
import warnings
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.machine import version_of
from engram_store.bench.peers.table import PeerTable

PeerRows = NDArray[np.int64]
"""Row ids, int64 [n], as every peer takes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """What a peer is, and how much of the workload it can be asked to do."""

    name: str
    what: str
    """How it is used here, for the record."""
    module: str
    """Whose import tells whether the peer can be used."""
    distribution: str
    """Whose version is recorded."""
    extra: str = "bench"
    """Extra of engram-store that installs it."""
    every_lookup: bool = False
    """Its users ask it for repeats, too, so that is measured as well."""
    most_rows: int | None = None
    """Rows of the largest table that is made for it; None: any."""
    most_batch_rows: int | None = None
    """Rows that it is asked for at once; None: any."""
    most_rounds: int | None = None
    """Timed rounds; None: as many as the workload has."""


class Peer(Protocol):
    """One way to hold the rows of a table. `read` and `train` are what is timed."""

    traits: Traits

    def open(self, table: PeerTable) -> int:
        """Get the table ready and warm: everything that is paid for once.

        Returns:
            How many rows it holds: the first ones of the table.

        Raises:
            Exception: of any kind; the peer is then reported as failed.
        """
        ...

    def read(self, rows: PeerRows) -> NDArray[Any]:
        """Rows in request order: bfloat16 as uint16 bits, or float32; [n, dim].

        Args:
            rows: int64 [n], each below what `open` returned. Repeats are fine.
        """
        ...

    def close(self) -> None:
        """Give memory and files back. Also after a failed `open`."""
        ...


@runtime_checkable
class TrainingPeer(Protocol):
    """A peer that can also update rows."""

    def train(self, rows: PeerRows, gradients: NDArray[np.float32]) -> None:
        """One whole step: forward, backward and optimiser, of distinct rows.

        Args:
            rows: int64 [n], distinct.
            gradients: float32 [n, dim] of what forward gave.
        """
        ...


def missing(traits: Traits) -> str | None:
    """Why a peer cannot be used, and what to do; None: it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not about our use of it
            importlib.import_module(traits.module)
    except Exception as error:  # what a foreign library raises when it is loaded is its own affair
        if isinstance(error, ModuleNotFoundError) and error.name == traits.module:
            return f"not installed; install it with `pip install 'engram-store[{traits.extra}]'`"
        version, message = version_of(traits.distribution), str(error).splitlines()[0]
        # Libraries put whole paths into such messages; a record has no use for them.
        short = " ".join(word.rpartition("/")[2] for word in message.split())
        return (
            f"{traits.distribution} {version} cannot be loaded ({type(error).__name__}: {short}); "
            "install a version that fits the other packages"
        )
    return None


def as_bits(rows: NDArray[Any]) -> NDArray[np.uint16]:
    """What `Peer.read` gave, as bfloat16 bits.

    Args:
        rows: uint16 bits, or float32 values that bfloat16 can hold exactly.

    Raises:
        TypeError: another dtype: the peer answers in a format of its own.
    """
    if rows.dtype == np.uint16:
        return rows
    if rows.dtype != np.float32:
        raise TypeError(f"rows are {rows.dtype}; a peer gives uint16 bits or float32")
    return (np.ascontiguousarray(rows).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def as_floats(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
