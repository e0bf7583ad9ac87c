"""A store's counters, asked for outside the session."""

from collections.abc import Mapping
from typing import Any

from engram_store.errors import ProtocolError
from engram_store.layout.documents import parse_json
from engram_store.stats import HeadStats, OrderStats, StoreStats, TableStats, Waits
from engram_store.v1 import store_pb2 as pb
from engram_store.v1.store_pb2_grpc import StoreServiceStub
from engram_store_client.remote.options import RemoteOptions
from engram_store_client.remote.unary import ask


def fetch_statistics(stub: StoreServiceStub, address: str, options: RemoteOptions) -> StoreStats:
    """Ask once.

    Raises:
        As `unary.ask`.
    """
    request = pb.GetStatisticsRequest(store=options.store)
    seconds = options.deadline_seconds
    response = ask(stub.GetStatistics, request, address, asked="statistics", seconds=seconds)
    return decode_statistics(response.statistics_json)


def decode_statistics(text: str) -> StoreStats:
    """The record of a GetStatisticsResponse. Raises: ProtocolError for one of another version."""
    try:
        record = parse_json(text)
        tables = {int(layer): _table(table) for layer, table in record["tables"].items()}
        return StoreStats(**record | {"tables": tables, "waits": _waits(record["waits"])})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the store's statistics are not those of this version: {error}"
        ) from error


def _table(record: Mapping[str, Any]) -> TableStats:
    parts = {
        "waits": _waits(record["waits"]),
        "growth": tuple((step, rows) for step, rows in record["growth"]),
        "orders": tuple(_order(order) for order in record["orders"]),
    }
    return TableStats(**{**record, **parts})


def _order(record: Mapping[str, Any]) -> OrderStats:
    return OrderStats(**{**record, "heads": tuple(HeadStats(**head) for head in record["heads"])})


def _waits(record: Mapping[str, Any]) -> Waits:
    return Waits(**{**record, "counts": tuple(record["counts"])})
