"""Stores behind a gRPC server in this process: what tests of the wire connect to."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc

from engram_store import wire
from engram_store.slots import slot_door
from engram_store.store import Store
from engram_store_server.gate import StoreGate
from engram_store_server.limits import SessionLimits
from engram_store_server.servicer import StoreServicer
from engram_store_server.stores import Stores

_OPTIONS = [
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
]
_SECONDS = 30.0
_SESSIONS = 64
_T = TypeVar("_T")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop, on a thread, for all servers: several disturb each other in grpc.aio."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="test-servers", daemon=True).start()
    return loop


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    return asyncio.run_coroutine_threadsafe(work, _loop()).result(_SECONDS)


async def _servicer(store: Store, limits: SessionLimits, door: Path | None) -> StoreServicer:
    return StoreServicer(Stores({"tests": store}, limits), limits, door)


async def _start(servicer: StoreServicer, target: str) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=_OPTIONS)
    gate = StoreGate(_SESSIONS)
    gate.open(servicer)
    server.add_generic_rpc_handlers((gate,))
    port = server.add_insecure_port(target)
    await server.start()
    return server, port


async def _stop(servicer: StoreServicer, server: grpc.aio.Server) -> None:
    servicer.stop()
    await server.stop(_SECONDS)


@contextlib.contextmanager
def serving(store: Store, address: str, limits: SessionLimits | None = None) -> Iterator[str]:
    """Serve a store on `unix:path`, or on a free port (`tcp:`).

    Yields:
        The address for `connect`.
    """
    door = slot_door(Path(address.removeprefix("unix:"))) if address != "tcp:" else None
    servicer = _run(_servicer(store, limits or SessionLimits(), door))
    server, port = _run(_start(servicer, "127.0.0.1:0" if address == "tcp:" else address))
    try:
        yield f"tcp://127.0.0.1:{port}" if address == "tcp:" else address
    finally:
        _run(_stop(servicer, server))
