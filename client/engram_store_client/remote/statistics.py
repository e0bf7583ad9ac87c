"""A store's counters, asked for outside the session."""

from engram_store.errors import ProtocolError
from engram_store.layout.documents import parse_json
from engram_store.stats import StoreStats, TableStats
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
        tables = {int(layer): TableStats(**table) for layer, table in record["tables"].items()}
        return StoreStats(**record | {"tables": tables})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the store's statistics are not those of this version: {error}"
        ) from error
