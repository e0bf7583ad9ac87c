"""The gRPC service: who may open a session, and what to do for unary calls."""

import asyncio
import hmac
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from engram_store import wire
from engram_store.chunks import Chunk
from engram_store.errors import EngramStoreError, FingerprintMismatchError, ProtocolError
from engram_store.v1 import store_pb2 as pb
from engram_store_server.admin import StoreAdministration
from engram_store_server.incoming import Request
from engram_store_server.limits import SessionLimits
from engram_store_server.requests import failure
from engram_store_server.session import SessionServer
from engram_store_server.slots import SessionSlots, SlotDoor
from engram_store_server.stores import ServedStore, Stores

_SESSION_ID = re.compile(r"[0-9a-f]{32}")
_MODES = (pb.MODE_READ, pb.MODE_TRAIN)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class StoreServicer(StoreAdministration):
    """Serves stores that are open for training.

    Args:
        stores: the caller closes them.
        limits: of every session.
        door: where trainers of this host fetch shared memory; None: rows travel in messages.
    """

    def __init__(self, stores: Stores, limits: SessionLimits, door: Path | None = None) -> None:
        super().__init__(stores)
        self._stores, self._limits = stores, limits
        self._door = None if door is None else SlotDoor(door, self._slots_of)

    def _slots_of(self, token: bytes) -> SessionSlots | None:
        for served in self._stores.all():
            for session in list(served.sessions):
                if session.slots is not None and hmac.compare_digest(session.slots.token, token):
                    return session.slots
        return None

    def stop(self) -> None:
        """End every session; their streams close."""
        if self._door is not None:
            self._door.close()
        self._stores.end_sessions()

    # Some messages are bytes already: the gate's serialiser lets them pass.
    async def Session(  # type: ignore[override]  # noqa: N802 - named by the protocol
        self, request_iterator: AsyncIterator[Request], _context: Context
    ) -> AsyncIterator[pb.SessionResponse | bytes]:
        """See `SessionServer`; the first request is Hello."""
        try:
            first = await asyncio.wait_for(anext(request_iterator), self._limits.hello_seconds)
        except (StopAsyncIteration, TimeoutError):
            return
        try:
            served, session = await self._accept(first)
        except EngramStoreError as error:
            refused = failure(error)
            refused.id = first.id
            yield refused
            return
        served.sessions.add(session)
        try:
            yield pb.SessionResponse(id=first.id, welcome=self._welcome(served, session))
            # Closed here, not when it is collected: the cleanup gives windows back.
            async with aclosing(session.serve(request_iterator)) as responses:
                async for response in responses:
                    yield response
        finally:
            served.sessions.discard(session)
            await session.leave()

    async def _accept(self, request: Request) -> tuple[ServedStore, SessionServer]:
        """Raises: ProtocolError, FingerprintMismatchError."""
        if isinstance(request, Chunk) or request.WhichOneof("request") != "hello":
            raise ProtocolError("the first request of a session must be Hello")
        hello = request.hello
        if hello.oldest_protocol > wire.PROTOCOL or hello.protocol < wire.OLDEST_PROTOCOL:
            raise ProtocolError(
                f"the client speaks protocol {hello.oldest_protocol} to {hello.protocol}, this "
                f"store {wire.OLDEST_PROTOCOL} to {wire.PROTOCOL}; update the older of the two"
            )
        if not _SESSION_ID.fullmatch(hello.session_id) or hello.mode not in _MODES:
            raise ProtocolError("Hello needs a session_id of 32 hexadecimal digits and a mode")
        served = self._stores.find(hello.store)
        mine = served.store.metadata.fingerprint
        if hello.fingerprint and hello.fingerprint != mine:
            raise FingerprintMismatchError(
                "the client's recipe", {"fingerprint": (mine, hello.fingerprint)}
            )
        session = SessionServer(served, hello, self._limits, shared_memory=self._door is not None)
        if session.trains:
            session.job = await served.trainers.admit(session)
            await self._wait_for_restores(served, session)
        return served, session

    async def _wait_for_restores(self, served: ServedStore, session: SessionServer) -> None:
        """So that the step in Welcome is the one that counts.

        The session is admitted, so that no restore begins any more; one may have begun before.

        Raises: ProtocolError: it takes too long. The session is over, here as after any error.
        """
        seconds = self._limits.handover_seconds
        try:
            if not await self._restores.end_within(served.name, seconds):
                raise ProtocolError(
                    f"{served.name} is going back to a snapshot, which takes longer than the "
                    f"{seconds:g} seconds that a trainer waits for it (handover_seconds); connect "
                    "again when that is done"
                )
        except BaseException:
            await session.leave()
            raise

    def _welcome(self, served: ServedStore, session: SessionServer) -> pb.Welcome:
        store, limits = served.store, self._limits
        token_map = store.recipe.token_map
        return pb.Welcome(
            protocol=wire.PROTOCOL,
            server_version=metadata.version("engram-store"),
            store_id=store.store_id,
            fingerprint=store.metadata.fingerprint,
            recipe_json=json.dumps(store.recipe.to_json()),
            tables_json=json.dumps([spec.to_json() for spec in store.tables.values()]),
            token_map=None if token_map is None else wire.encode_array(token_map),
            step=store.step,
            slot_token=b"" if session.slots is None else session.slots.token,
            credits=pb.Credits(bytes=limits.session_bytes, windows=limits.open_windows),
            durable_step=served.durable_step,
            staleness=served.staleness,
        )
