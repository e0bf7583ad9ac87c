"""A store's counters, asked for outside the session."""

import json
from typing import Any, cast

import grpc

from engram_store import wire
from engram_store.errors import (
    DeadlineError,
    EngramStoreError,
    ProtocolError,
    StoreUnreachableError,
)
from engram_store.stats import StoreStats, TableStats
from engram_store.v1 import store_pb2 as pb
from engram_store.v1.store_pb2_grpc import StoreServiceStub
from engram_store_client.remote.stream import describe


def fetch_statistics(stub: StoreServiceStub, address: str, seconds: float) -> StoreStats:
    """Ask once.

    Raises:
        DeadlineError, StoreUnreachableError.
        EngramStoreError: what the store raised.
    """
    try:
        response = stub.GetStatistics(pb.GetStatisticsRequest(), timeout=seconds)
    except grpc.RpcError as error:
        raise _error_of(error, address, seconds) from error
    except ValueError as error:  # gRPC's, for a channel that was closed
        raise StoreUnreachableError(address, str(error)) from error
    return _decode(response.statistics_json)


def _decode(text: str) -> StoreStats:
    """Raises: ProtocolError for a record of another version."""
    try:
        record = json.loads(text)
        tables = {int(layer): TableStats(**table) for layer, table in record["tables"].items()}
        return StoreStats(**record | {"tables": tables})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the store's statistics are not those of this version: {error}"
        ) from error


def _error_of(error: grpc.RpcError, address: str, seconds: float) -> EngramStoreError:
    """The error that the store raised, or what happened on the way."""
    metadata: dict[str, bytes] = dict(cast("Any", error).trailing_metadata() or ())
    if wire.FAILURE_KEY in metadata:
        return wire.decode_error(pb.Failure.FromString(metadata[wire.FAILURE_KEY]))
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError("statistics", seconds)
    return StoreUnreachableError(address, describe(error))
