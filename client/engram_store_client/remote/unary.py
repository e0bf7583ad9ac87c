"""Calls outside the session: asked once, answered within a deadline."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import grpc

from engram_store import wire
from engram_store.errors import (
    DeadlineError,
    EngramStoreError,
    ProtocolError,
    StoreUnreachableError,
)
from engram_store.v1 import store_pb2 as pb
from engram_store_client.remote.stream import describe

_REFUSALS = {
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""Of gRPC's own: the process is there, and asking again changes nothing."""
_Response = TypeVar("_Response")


def ask(
    method: Callable[..., _Response], request: Any, address: str, *, asked: str, seconds: float
) -> _Response:
    """Make one call.

    Args:
        method: of a stub.
        request: its message.
        address: where the stub's channel goes, for messages.
        asked: what the call is about, for messages.
        seconds: how long the answer may take.

    Raises:
        DeadlineError: there was no answer in time; whether it was done is unknown.
        StoreUnreachableError: nothing answers there, or it went away; unknown as well.
        ProtocolError: what answers there does not take the call.
        EngramStoreError: what the store raised, of the same class.
    """
    try:
        return method(request, timeout=seconds)
    except grpc.RpcError as error:
        raise _error_of(error, address, asked, seconds) from error
    except ValueError as error:  # gRPC's, for a channel that was closed
        raise StoreUnreachableError(address, str(error)) from error


def _error_of(error: grpc.RpcError, address: str, asked: str, seconds: float) -> EngramStoreError:
    """The error that the store raised, or what happened on the way."""
    metadata: dict[str, bytes] = dict(cast("Any", error).trailing_metadata() or ())
    if wire.FAILURE_KEY in metadata:
        return wire.decode_error(pb.Failure.FromString(metadata[wire.FAILURE_KEY]))
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(asked, seconds)
    if error.code() in _REFUSALS:
        return ProtocolError(f"{address} refuses the call ({asked}): {describe(error)}")
    return StoreUnreachableError(address, describe(error))
