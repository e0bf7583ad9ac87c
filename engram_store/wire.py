"""Messages to arrays, errors and records, and back; the same on both sides of the wire.

Nothing here trusts what it decodes: sizes and dtypes are checked before anything is allocated.
Imports protobuf, not grpc.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store import errors
from engram_store.errors import EngramStoreError, ProtocolError
from engram_store.session import SnapshotRef
from engram_store.v1 import store_pb2 as pb

PROTOCOL = 1
"""Newest protocol this version speaks; it also speaks the one before, once there is one."""
OLDEST_PROTOCOL = 1
MAX_MESSAGE_BYTES = 256 << 20
FAILURE_KEY = "engram-store-failure-bin"
"""Trailing metadata of a failed unary call: the `Failure` message."""
KEEPALIVE_SECONDS = 30
"""How often a client asks a silent connection for a sign of life; the server must allow it."""
_DTYPES = {"<i8", "<i4", "<u2", "<f2", "<f4", "|u1", "|b1"}
ReadSlot = Callable[[pb.SlotRange], NDArray[np.uint8]]
"""The bytes of a slot range; raises ProtocolError for one that is not there."""


def encode_array(array: NDArray[Any], slot: pb.SlotRange | None = None) -> pb.Array:
    """An array as a message; with `slot` its bytes are there already."""
    message = pb.Array(dtype=array.dtype.str, shape=array.shape)
    if slot is None:
        message.data = np.ascontiguousarray(array).tobytes()
    else:
        message.slot.CopyFrom(slot)
    return message


def decode_array(message: pb.Array, read_slot: ReadSlot | None = None) -> NDArray[Any]:
    """Inverse of `encode_array`; read-only memory of the message, or memory of the slot.

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
    if message.HasField("slot"):
        if read_slot is None:
            raise ProtocolError("array in a slot, but this connection has no shared memory")
        data = read_slot(message.slot)
    if len(data) != needed:
        raise ProtocolError(f"array {shape} of {dtype} has {len(data)} bytes, needs {needed}")
    return np.frombuffer(data, dtype).reshape(shape)


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
    except ValueError:
        fields = {}
    if isinstance(fields, dict):
        vars(error).update(fields)
    return error


def encode_ref(ref: SnapshotRef) -> pb.SnapshotRef:
    """A snapshot's name as a message."""
    return pb.SnapshotRef(store_id=ref.store_id, step=ref.step, digest=ref.digest)


def decode_ref(message: pb.SnapshotRef) -> SnapshotRef:
    """Inverse of `encode_ref`."""
    return SnapshotRef(store_id=message.store_id, step=message.step, digest=message.digest)
