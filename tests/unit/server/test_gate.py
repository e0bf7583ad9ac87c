"""The gate counts the calls it lets through, so that an ending process knows what it waits for."""

import asyncio
from types import SimpleNamespace
from typing import Any

from engram_store.v1 import store_pb2 as pb
from engram_store_server.gate import SERVICE, StoreGate


class SlowService:
    """Its administration calls last until `finish` is set; everything else is not there."""

    def __init__(self) -> None:
        self.finish = asyncio.Event()

    async def SealStore(self, _request: Any, _context: Any) -> pb.SealStoreResponse:  # noqa: N802
        await self.finish.wait()
        return pb.SealStoreResponse()

    def __getattr__(self, name: str) -> Any:
        return None


def details(method: str) -> Any:
    """What gRPC tells of a call."""
    return SimpleNamespace(method=method, invocation_metadata=())


def test_draining_waits_for_calls_under_way() -> None:
    """It ends when they end, or when the time is over; a closed gate lets none in."""

    async def scenario() -> None:
        service: Any = SlowService()
        gate = StoreGate(max_sessions=1)
        gate.open(service)
        handler = gate.service(details(f"/{SERVICE}/SealStore"))
        call = asyncio.create_task(handler.unary_unary(pb.SealStoreRequest(), None))
        await asyncio.sleep(0)

        gate.close()
        assert await gate.drain(0) == 1
        draining = asyncio.create_task(gate.drain(60))
        assert gate.service(details(f"/{SERVICE}/SealStore")).unary_unary is None
        service.finish.set()

        assert await draining == 0
        assert await call == pb.SealStoreResponse()
        assert await gate.drain(0) == 0

    asyncio.run(scenario())


def test_other_services_and_unknown_methods_are_not_the_gates() -> None:
    """gRPC then asks the next handler, or answers UNIMPLEMENTED."""

    async def scenario() -> None:
        service: Any = SlowService()
        gate = StoreGate(max_sessions=1)
        gate.open(service)
        assert gate.service(details("/grpc.health.v1.Health/Check")) is None
        assert gate.service(details(f"/{SERVICE}/Nothing")) is None

    asyncio.run(scenario())
