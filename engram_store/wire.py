"""Messages to arrays, errors and records, and back; the same on both sides of the wire.

Nothing here trusts what it decodes: sizes and dtypes are checked before anything is allocated.
Imports protobuf, not grpc.
"""

import errno
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store import errors, limits
from engram_store.errors import CapacityError, EngramStoreError, ProtocolError
from engram_store.recipes import Recipe
from engram_store.session import SnapshotRef
from engram_store.slots import SlotRange
from engram_store.types import TableSpec
from engram_store.v1 import store_pb2 as pb

PROTOCOL = 1
"""Newest protocol this version speaks; it also speaks the one before, once there is one."""
OLDEST_PROTOCOL = 1
MAX_MESSAGE_BYTES = limits.MAX_MESSAGE_BYTES
FAILURE_KEY = "engram-store-failure-bin"
"""Trailing metadata of a failed unary call: the `Failure` message."""
KEEPALIVE_SECONDS = 30
"""How often a client asks a silent connection for a sign of life; the server must allow it."""
_DTYPES = {"<i8", "<i4", "<u2", "<f2", "<f4", "|u1", "|b1"}
ReadSlot = Callable[[SlotRange], NDArray[np.uint8]]
"""The bytes of a slot range; raises ProtocolError for one that is not there."""


def encode_array(array: NDArray[Any], where: SlotRange | None = None) -> pb.Array:
    """An array as a message; with `where` its bytes are in shared memory already."""
    message = pb.Array(dtype=array.dtype.str, shape=array.shape)
    if where is None:
        message.data = np.ascontiguousarray(array).tobytes()
    else:
        message.slot.slot, message.slot.offset = where.slot, where.offset
        message.slot.length, message.slot.sequence = where.length, where.sequence
    return message


def decode_array(
    message: pb.Array,
    read_slot: ReadSlot | None = None,
    received: NDArray[np.uint8] | None = None,
) -> NDArray[Any]:
    """Inverse of `encode_array`; read-only memory of the message, or memory of the slot.

    Args:
        message: says where the bytes are.
        read_slot: for bytes in a slot.
        received: uint8 [n], what came in chunks.

    Raises:
        ProtocolError: an unknown dtype, or bytes and shape that do not fit each other.
    """
    if message.dtype not in _DTYPES:
        raise ProtocolError(f"array of dtype {message.dtype!r}; allowed are {sorted(_DTYPES)}")
    dtype, shape = np.dtype(message.dtype), tuple(message.shape)
    if len(shape) > 4 or any(size < 0 for size in shape):
        raise ProtocolError(f"array of shape {shape}; it has at most 4 axes, none negative")
    needed = dtype.itemsize * math.prod(shape)
    data: Any = message.data
    if message.in_chunks:
        if received is None:
            raise ProtocolError("array in chunks, but none of them came before")
        data = received
    elif message.HasField("slot"):
        if read_slot is None:
            raise ProtocolError("array in a slot, but this connection has no shared memory")
        slot = message.slot
        data = read_slot(SlotRange(slot.slot, slot.offset, slot.length, slot.sequence))
    if len(data) != needed:
        raise ProtocolError(f"array {shape} of {dtype} has {len(data)} bytes, needs {needed}")
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # no elements, but axes too long for any array
        raise ProtocolError(f"array of shape {shape}: {error}") from error


def session_cost(
    recipe: Recipe, tables: Mapping[int, TableSpec], tokens: int, *, trains: bool
) -> int:
    """Bytes of a session's credit that an open window takes, at most what it really needs.

    Nobody knows how many rows are distinct before the store has hashed them, so all count: ids
    and inverse, the rows, and their fp32 gradient if it trains.

    Args:
        recipe, tables: of the store.
        tokens: of the window.
        trains: whether it was announced with a step.
    """
    lookups = tokens * recipe.columns
    per_lookup = sum(8 + t.row_bytes + (4 * t.dim if trains else 0) for t in tables.values())
    return lookups * per_lookup


def window_limit_error(limit: int) -> CapacityError:
    """One session has too many windows open."""
    return CapacityError(
        errno.ENOSPC,
        f"{limit} windows are open, as many as a session may have; close or commit some, or raise "
        "the store's open_windows",
    )


def credit_error(cost: int, taken: int, limit: int) -> CapacityError:
    """One session's windows need too much memory."""
    return CapacityError(
        errno.ENOSPC,
        f"the window may need {cost:,} bytes of the store's memory; open windows of this session "
        f"take {taken:,} of {limit:,}. Close or commit some, announce fewer tokens at once, or "
        "raise the store's session_bytes",
    )


def encode_error(error: EngramStoreError) -> pb.Failure:
    """An error as a message."""
    fields = {key: value for key, value in vars(error).items() if _is_plain(value)}
    message = getattr(error, "strerror", None) or str(error)
    return pb.Failure(error=type(error).__name__, message=message, fields=json.dumps(fields))


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def decode_error(failure: pb.Failure) -> EngramStoreError:
    """The same error class with the same message; `EngramStoreError` for one unknown here."""
    kind = getattr(errors, failure.error, EngramStoreError)
    if not (isinstance(kind, type) and issubclass(kind, EngramStoreError)):
        kind = EngramStoreError
    # Constructors take what the message was made of; the message itself is all there is here.
    error: EngramStoreError = kind.__new__(kind, failure.message)
    error.args = (failure.message,)
    try:
        fields = json.loads(failure.fields or "{}")
    except (ValueError, RecursionError):
        fields = {}
    if isinstance(fields, dict):
        # Never a method's name: a store must not decide what an exception does.
        vars(error).update({key: fields[key] for key in fields if not hasattr(kind, key)})
    return error


def encode_ref(ref: SnapshotRef) -> pb.SnapshotRef:
    """A snapshot's name as a message."""
    return pb.SnapshotRef(store_id=ref.store_id, step=ref.step, digest=ref.digest)


def decode_ref(message: pb.SnapshotRef) -> SnapshotRef:
    """Inverse of `encode_ref`."""
    return SnapshotRef(store_id=message.store_id, step=message.step, digest=message.digest)
