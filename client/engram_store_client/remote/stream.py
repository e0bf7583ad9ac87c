"""One `Session` call: requests from any thread out, responses to a callback in."""

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue

import grpc
import numpy as np

from engram_store import chunks, wire
from engram_store.chunks import Chunk
from engram_store.errors import (
    CapacityError,
    EngramStoreError,
    ProtocolError,
    StoreUnreachableError,
)
from engram_store.slots import SlotRange
from engram_store.types import GradientBlock
from engram_store.v1 import store_pb2 as pb
from engram_store.v1.store_pb2_grpc import StoreServiceStub
from engram_store_client.remote.credentials import ClientTls
from engram_store_client.remote.incoming import IncomingAnswers
from engram_store_client.remote.slots import TrainerSlots

_CHANNEL_OPTIONS = [
    *chunks.CHANNEL_OPTIONS,
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 1000 * wire.KEEPALIVE_SECONDS),
    ("grpc.keepalive_timeout_ms", 1000 * wire.KEEPALIVE_SECONDS),
    # When to try again is decided here, so no attempt may inherit gRPC's own back-off.
    ("grpc.use_local_subchannel_pool", 1),
]
_SESSION = f"/{pb.DESCRIPTOR.services_by_name['StoreService'].full_name}/Session"
_REFUSALS = {
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}
_GOODBYE_SECONDS = 5.0


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | ClientTls | None
) -> grpc.Channel:
    """A channel to `unix:path` or `host:port`; nothing is sent yet."""
    if isinstance(credentials, ClientTls):
        return credentials.open_channel(address, _CHANNEL_OPTIONS)
    if credentials is None:
        return grpc.insecure_channel(address, _CHANNEL_OPTIONS)
    return grpc.secure_channel(address, credentials, _CHANNEL_OPTIONS)


Response = pb.SessionResponse | Chunk[pb.RowsChunk]
"""What a stream receives."""


class Stream:
    """A connection that lives until it breaks; it is never mended, only replaced.

    Args:
        address: for messages.
        channel: of this stream alone, closed with it.
        hello: the first request.
        deliver: gets every response after the first, on the stream's thread.
        ended: called once, on the stream's thread, when a welcomed stream has ended.
    """

    def __init__(
        self,
        address: str,
        channel: grpc.Channel,
        hello: pb.SessionRequest,
        deliver: Callable[["Stream", Response], None],
        ended: Callable[["Stream", EngramStoreError], None],
    ) -> None:
        self.stub = StoreServiceStub(channel)
        self.ended = threading.Event()
        self.slots: TrainerSlots | None = None
        """Shared memory of this connection; None: arrays travel in messages."""
        self.incoming = IncomingAnswers()
        """Belongs to the stream's thread."""
        self._address, self._channel = address, channel
        self._deliver, self._on_end = deliver, ended
        self._first: Future[Response] = Future()
        self._requests: SimpleQueue[tuple[pb.SessionRequest, GradientBlock | None] | None]
        self._requests = SimpleQueue()
        """Requests, and gradients that go ahead of them in chunks."""
        self._requests.put((hello, None))
        # The generated stub would copy rows and gradients twice more.
        session = channel.stream_stream(
            _SESSION,
            request_serializer=chunks.REQUESTS.serialize,
            response_deserializer=chunks.RESPONSES.deserialize,
        )
        self._call = session(self._messages())
        self._thread = threading.Thread(target=self._read, name="engram-stream", daemon=True)
        self._thread.start()

    def welcome(self, seconds: float) -> pb.Welcome:
        """The answer to the hello.

        Raises:
            StoreUnreachableError: there is none.
            EngramStoreError: why the session was refused. The stream is closed, here as above.
        """
        try:
            response = self._first.result(seconds)
        except TimeoutError:
            self.abort()
            problem = f"it took a connection but gave no answer within {seconds:g} s"
            raise StoreUnreachableError(self._address, problem) from None
        if not isinstance(response, Chunk) and response.HasField("welcome"):
            return response.welcome
        self.abort()
        if not isinstance(response, Chunk) and response.HasField("failure"):
            raise wire.decode_error(response.failure)
        raise ProtocolError(f"what answers at {self._address} did not welcome the session")

    def send(self, request: pb.SessionRequest, gradients: GradientBlock | None = None) -> None:
        """Send after everything sent before; lost without a word if the stream has broken.

        Args:
            request: what to send.
            gradients: of a push; see `place`.
        """
        if gradients is not None:
            push = pb.Push()
            push.CopyFrom(request.push)
            gradients = np.ascontiguousarray(self.place(push.window, gradients))
            where = self._place_of(gradients)
            if where is None and gradients.nbytes >= chunks.INLINE_BYTES:
                push.gradients.CopyFrom(chunks.announce(gradients))
            else:
                push.gradients.CopyFrom(wire.encode_array(gradients, where))
                gradients = None
            request = pb.SessionRequest(id=request.id, push=push)
        if self.slots is not None:
            # What could not be placed was lost with the connection, and is sent through the next.
            if gradients is None:
                self.slots.post(request)
            return
        self._requests.put((request, gradients))

    def _messages(self) -> Iterator[pb.SessionRequest | bytes]:
        """On gRPC's thread: chunks are made when the stream takes them."""
        while (sending := self._requests.get()) is not None:
            request, gradients = sending
            if gradients is not None:
                yield from _cut(request, gradients)
            yield request

    def place(self, window: int, gradients: GradientBlock) -> GradientBlock:
        """The gradient where this connection's store sees it: as it is, or copied there."""
        if self.slots is None or not gradients.size or self.slots.exchange.holds(gradients):
            return gradients
        try:
            buffer = self.slots.lend(window, gradients.nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise CapacityError(
                    error.errno,
                    f"there is no shared memory for a gradient of {gradients.nbytes:,} bytes; "
                    "raise the memory limit, or announce windows of fewer tokens",
                ) from error
            return gradients  # the stream is breaking; it is placed in the next one's memory
        placed = buffer[: gradients.nbytes].view(gradients.dtype).reshape(gradients.shape)
        np.copyto(placed, gradients)
        return placed

    def _place_of(self, gradients: GradientBlock) -> SlotRange | None:
        if self.slots is None or not self.slots.exchange.holds(gradients):
            return None
        return self.slots.exchange.range_of(gradients)

    def close(self, goodbye: pb.SessionRequest) -> None:
        """Say that no more requests come, and wait for the store to let go."""
        self._requests.put((goodbye, None))
        self._requests.put(None)
        self._thread.join(_GOODBYE_SECONDS)
        self.abort()

    def abort(self) -> None:
        """End the stream at once."""
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()
        if self.slots is not None:
            self.slots.close()

    def _read(self) -> None:
        reason: EngramStoreError
        reason = StoreUnreachableError(self._address, "the store ended the connection")
        try:
            for response in self._call:
                if self._first.done():
                    self._deliver(self, response)
                else:
                    self._first.set_result(response)
        except grpc.RpcError as error:
            reason = self._reason(error)
        self.ended.set()
        self._requests.put(None)  # lets gRPC's sending thread go
        if self._first.done():
            self._on_end(self, reason)
        else:
            self._first.set_exception(reason)
            self._channel.close()

    def _reason(self, error: grpc.RpcError) -> EngramStoreError:
        """Refusals would be repeated; anything else may be better the next time."""
        too_large = self._first.done() and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        if too_large or error.code() in _REFUSALS:
            return ProtocolError(f"{self._address} refuses the session: {describe(error)}")
        return StoreUnreachableError(self._address, describe(error))


def _cut(request: pb.SessionRequest, gradients: GradientBlock) -> Iterator[bytes]:
    """The chunks of a push, which go ahead of it."""
    content, push = chunks.bytes_of(gradients), request.push
    for start, end in chunks.cut(content.size):
        chunk = pb.GradientChunk(window=push.window, layer=push.layer, offset=start)
        yield chunks.REQUESTS.encode(request.id, chunk, content[start:end])


def describe(error: grpc.RpcError) -> str:
    """What went wrong, in gRPC's words."""
    return f"{error.code().name}: {error.details()}"
