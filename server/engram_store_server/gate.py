"""What stands before the store's service: closed until the store is open, and when it stops."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeAlias, cast

import grpc

from engram_store.chunks import REQUESTS, RESPONSES
from engram_store.v1 import store_pb2 as pb
from engram_store.v1 import store_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["StoreService"].full_name
_OPENING = "the store is being opened; try again in a moment"
_STOPPING = "the store process is stopping; try again when it was started again"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class StoreGate(grpc.GenericRpcHandler):
    """Answers calls of the store's service; UNAVAILABLE before `open` and after `close`.

    gRPC takes handlers only before a server starts, and the server starts before the store is
    open so that health checks are answered meanwhile. For the same reason the gate closes before
    the server stops.
    """

    def __init__(self, max_sessions: int) -> None:
        self._max_sessions = max_sessions
        self._sessions = 0
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal = _OPENING
        self._inner: list[grpc.GenericRpcHandler] = []

    def open(self, servicer: pb_grpc.StoreServiceServicer) -> None:
        """Pass calls on from now on."""
        pb_grpc.add_StoreServiceServicer_to_server(servicer, cast("grpc.aio.Server", self))
        self._refusal = ""

    def close(self) -> None:
        """Refuse new calls; those under way go on."""
        self._refusal = _STOPPING

    async def drain(self, seconds: float) -> int:
        """Wait until no call is under way, at most so long; returns how many still are."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._calls

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """What generated code calls on a server."""
        self._inner = list(handlers)

    def add_registered_method_handlers(self, *_arguments: object) -> None:
        """What generated code calls on a server besides; of no use to an asynchronous one."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of a call, or None if it is none of the store's."""
        if not details.method.startswith(f"/{SERVICE}/"):
            return None
        if self._refusal:
            return grpc.stream_stream_rpc_method_handler(self._refuse)
        handler: Any = self._inner[0].service(details)
        if handler is None:
            return None
        if handler.request_streaming:
            session = self._session(handler.stream_stream)
            # Rows and gradients are not to be copied by the generated classes.
            chunked = (REQUESTS.deserialize, RESPONSES.serialize)
            return grpc.stream_stream_rpc_method_handler(session, *chunked)
        codec = (handler.request_deserializer, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(self._call(handler.unary_unary), *codec)

    async def _refuse(self, _requests: Any, context: _Context) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, self._refusal)

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def _call(self, method: Any) -> Any:
        """The same unary method, counted."""

        async def call(request: Any, context: _Context) -> Any:
            with self._under_way():
                return await method(request, context)

        return call

    def _session(self, method: Any) -> Any:
        """The same stream, counted, and refused while there are as many as are allowed."""

        async def serve(requests: Any, context: _Context) -> AsyncIterator[pb.SessionResponse]:
            if self._sessions >= self._max_sessions:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"the store has {self._sessions} sessions, as many as max_sessions allows; "
                    "end one, or start the store with more",
                )
            self._sessions += 1
            try:
                # An abandoned stream would otherwise be cleaned up at some later time.
                with self._under_way():
                    async with aclosing(method(requests, context)) as responses:
                        async for response in responses:
                            yield response
            finally:
                self._sessions -= 1

        return serve
