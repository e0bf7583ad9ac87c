"""The gRPC service: decode, call, encode."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc

from engram_store import wire
from engram_store.errors import (
    CapacityError,
    ChecksumError,
    EngramStoreError,
    FingerprintMismatchError,
    InputError,
    ProtocolError,
    ReadOnlyError,
    RowRangeError,
    StoreClosedError,
    StoreLockedError,
    StoreNotFoundError,
    TokenRangeError,
)
from engram_store.layout.inspect import describe, description_json
from engram_store.layout.paths import StorePaths
from engram_store.store import Store
from engram_store.v1 import store_pb2 as pb
from engram_store.v1 import store_pb2_grpc as pb_grpc
from engram_store_server.session import SessionServer, failure
from engram_store_server.slots import SessionSlots, SlotDoor

_HELLO_SECONDS = 10.0
_GRACE_SECONDS = 1.0
_STATUS: tuple[tuple[type[EngramStoreError], grpc.StatusCode], ...] = (
    (TokenRangeError, grpc.StatusCode.OUT_OF_RANGE),
    (RowRangeError, grpc.StatusCode.OUT_OF_RANGE),
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (StoreClosedError, grpc.StatusCode.UNAVAILABLE),
    (ReadOnlyError, grpc.StatusCode.PERMISSION_DENIED),
    (ProtocolError, grpc.StatusCode.FAILED_PRECONDITION),
    (FingerprintMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (ChecksumError, grpc.StatusCode.DATA_LOSS),
    (StoreNotFoundError, grpc.StatusCode.NOT_FOUND),
    (StoreLockedError, grpc.StatusCode.ALREADY_EXISTS),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
)
"""First match counts; anything else is UNKNOWN."""
_T = TypeVar("_T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class StoreServicer(pb_grpc.StoreServiceServicer):
    """Serves one store that is open for training.

    Args:
        store: opened with mode 'train'; the caller closes it.
        door: where trainers of this host fetch shared memory; None: rows travel in messages.
    """

    def __init__(self, store: Store, door: Path | None = None) -> None:
        self._store = store
        self._sessions: set[SessionServer] = set()
        self._trainer: SessionServer | None = None
        self._door = None if door is None else SlotDoor(door, self._slots_of)

    def _slots_of(self, token: bytes) -> SessionSlots | None:
        for session in list(self._sessions):
            if session.slots is not None and hmac.compare_digest(session.slots.token, token):
                return session.slots
        return None

    async def stop(self) -> None:
        """End every session; their streams close."""
        if self._door is not None:
            self._door.close()
        for session in self._sessions:
            session.end()

    # ------------------------------------------------------------------ sessions

    async def Session(  # noqa: N802 - named by the protocol
        self, request_iterator: AsyncIterator[pb.SessionRequest], _context: Context
    ) -> AsyncIterator[pb.SessionResponse]:
        """See `SessionServer`; the first request is Hello."""
        try:
            first = await asyncio.wait_for(anext(request_iterator), _HELLO_SECONDS)
        except (StopAsyncIteration, TimeoutError):
            return
        try:
            session = await self._accept(first)
        except EngramStoreError as error:
            refused = failure(error)
            refused.id = first.id
            yield refused
            return
        self._sessions.add(session)
        try:
            yield pb.SessionResponse(id=first.id, welcome=self._welcome(session))
            # Closed here, not when it is collected: the cleanup gives windows back.
            async with aclosing(session.serve(request_iterator)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._sessions.discard(session)
            if self._trainer is session:
                self._trainer = None

    async def _accept(self, request: pb.SessionRequest) -> SessionServer:
        """Raises: ProtocolError, FingerprintMismatchError."""
        if request.WhichOneof("request") != "hello":
            raise ProtocolError("the first request of a session must be Hello")
        hello = request.hello
        if hello.oldest_protocol > wire.PROTOCOL or hello.protocol < wire.OLDEST_PROTOCOL:
            raise ProtocolError(
                f"the client speaks protocol {hello.oldest_protocol} to {hello.protocol}, this "
                f"store {wire.OLDEST_PROTOCOL} to {wire.PROTOCOL}; update the older of the two"
            )
        if len(hello.session_id) != 32 or hello.mode not in (pb.MODE_READ, pb.MODE_TRAIN):
            raise ProtocolError("Hello needs a session_id of 32 hexadecimal digits and a mode")
        mine = self._store.metadata.fingerprint
        if hello.fingerprint and hello.fingerprint != mine:
            raise FingerprintMismatchError(
                "the client's recipe", {"fingerprint": (mine, hello.fingerprint)}
            )
        session = SessionServer(self._store, hello, shared_memory=self._door is not None)
        if session.trains:
            await self._take_over(session)
        return session

    async def _take_over(self, session: SessionServer) -> None:
        """One session trains; its own newer connection replaces an older one.

        What the older one had under way is finished first: the step in Welcome is what counts,
        and windows that are announced again must not meet themselves.

        Raises:
            ProtocolError: another session trains, or a newer connection of this one.
        """
        while (current := self._trainer) is not None:
            if current.session_id != session.session_id:
                # A trainer that was just stopped may not have been noticed yet.
                if await current.ends_within(_GRACE_SECONDS):
                    if self._trainer is current:
                        self._trainer = None
                    continue
                raise ProtocolError(
                    "another session is training this store; connect with mode='read', or wait "
                    "until it has ended"
                )
            if session.epoch <= current.epoch:
                raise ProtocolError(
                    f"epoch {session.epoch} of this session was replaced by {current.epoch}; "
                    "another connection of the same trainer took over"
                )
            await current.leave()
            if self._trainer is current:
                self._trainer = None
        self._trainer = session

    def _welcome(self, session: SessionServer) -> pb.Welcome:
        store = self._store
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
        )

    # ------------------------------------------------------------------ administration

    async def InspectStore(  # noqa: N802
        self, _request: pb.InspectStoreRequest, context: Context
    ) -> pb.InspectStoreResponse:
        """What the store is, from its files."""
        paths = StorePaths(self._store.path)
        description = await _call(context, lambda: description_json(describe(paths)))
        return pb.InspectStoreResponse(description_json=json.dumps(description))

    async def GetStatistics(  # noqa: N802
        self, _request: pb.GetStatisticsRequest, context: Context
    ) -> pb.GetStatisticsResponse:
        """Counters since the process opened the store."""
        stats = await _call(context, self._store.stats)
        return pb.GetStatisticsResponse(statistics_json=json.dumps(asdict(stats)))

    async def CreateSnapshot(  # noqa: N802
        self, _request: pb.CreateSnapshotRequest, context: Context
    ) -> pb.CreateSnapshotResponse:
        """Keep the tables as they are now."""
        ref = await _call(context, self._store.snapshot)
        return pb.CreateSnapshotResponse(snapshot=wire.encode_ref(ref))

    async def ListSnapshots(  # noqa: N802
        self, _request: pb.ListSnapshotsRequest, context: Context
    ) -> pb.ListSnapshotsResponse:
        """Steps that have a snapshot."""
        return pb.ListSnapshotsResponse(steps=await _call(context, self._store.snapshots))

    async def SealStore(  # noqa: N802
        self, _request: pb.SealStoreRequest, context: Context
    ) -> pb.SealStoreResponse:
        """Write the open memtable to disk."""
        await _call(context, self._store.seal)
        return pb.SealStoreResponse()

    async def FoldStore(  # noqa: N802
        self, _request: pb.FoldStoreRequest, context: Context
    ) -> pb.FoldStoreResponse:
        """Write segments into a new base generation."""
        await _call(context, self._store.fold)
        return pb.FoldStoreResponse()


async def _call(context: Context, function: Callable[[], _T]) -> _T:
    """Run a blocking call off the event loop; its errors become a status."""
    try:
        return await asyncio.get_running_loop().run_in_executor(None, function)
    except EngramStoreError as error:
        await _abort(context, error)


async def _abort(context: Context, error: EngramStoreError) -> NoReturn:
    code = next((c for kind, c in _STATUS if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
    message = wire.encode_error(error)
    metadata_ = ((wire.FAILURE_KEY, message.SerializeToString()),)
    await context.abort(code, message.message, metadata_)
    raise AssertionError("abort raises")
