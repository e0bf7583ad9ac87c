"""One `Session` call: requests from any thread out, responses to a callback in."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import grpc
import numpy as np
from numpy.typing import NDArray

from engram_store import wire
from engram_store.errors import EngramStoreError, ProtocolError, StoreUnreachableError
from engram_store.types import GradientBlock
from engram_store.v1 import store_pb2 as pb
from engram_store.v1.store_pb2_grpc import StoreServiceStub
from engram_store_client.remote.slots import TrainerSlots

_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 1000 * wire.KEEPALIVE_SECONDS),
    ("grpc.keepalive_timeout_ms", 1000 * wire.KEEPALIVE_SECONDS),
    # When to try again is decided here, so no attempt may inherit gRPC's own back-off.
    ("grpc.use_local_subchannel_pool", 1),
]
_REFUSALS = {
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}
_GOODBYE_SECONDS = 5.0


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """A channel to `unix:path` or `host:port`; nothing is sent yet."""
    if credentials is None:
        return grpc.insecure_channel(address, _CHANNEL_OPTIONS)
    return grpc.secure_channel(address, credentials, _CHANNEL_OPTIONS)


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
        deliver: Callable[["Stream", pb.SessionResponse], None],
        ended: Callable[["Stream", EngramStoreError], None],
    ) -> None:
        self.stub = StoreServiceStub(channel)
        self.ended = threading.Event()
        self.slots: TrainerSlots | None = None
        """Shared memory of this connection; None: arrays travel in messages."""
        self._lent: dict[int, NDArray[np.uint8]] = {}
        """Slots that hold gradients which the store has not answered for, by request."""
        self._address, self._channel = address, channel
        self._deliver, self._on_end = deliver, ended
        self._first: Future[pb.SessionResponse] = Future()
        self._requests: SimpleQueue[pb.SessionRequest | None] = SimpleQueue()
        self._requests.put(hello)
        self._call = self.stub.Session(iter(self._requests.get, None))
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
        if response.WhichOneof("response") == "welcome":
            return response.welcome
        self.abort()
        if response.WhichOneof("response") == "failure":
            raise wire.decode_error(response.failure)
        raise ProtocolError(f"what answers at {self._address} did not welcome the session")

    def send(self, request: pb.SessionRequest, gradients: GradientBlock | None = None) -> None:
        """Send after everything sent before; lost without a word if the stream has broken.

        Args:
            request: what to send.
            gradients: of a push; they are put where this connection's store finds them.
        """
        if gradients is not None:
            request = self._with_gradients(request, gradients)
        self._requests.put(request)

    def _with_gradients(
        self, request: pb.SessionRequest, gradients: GradientBlock
    ) -> pb.SessionRequest:
        """The push with its gradient, in shared memory or in the message."""
        where = None
        if self.slots is not None and gradients.size:
            where, self._lent[request.id] = self.slots.put(gradients)
        push = pb.Push(
            window=request.push.window,
            layer=request.push.layer,
            gradients=wire.encode_array(gradients, where),
        )
        return pb.SessionRequest(id=request.id, push=push)

    def _take_back(self, number: int) -> None:
        """The store has read what a request put into shared memory."""
        buffer = self._lent.pop(number, None)
        if buffer is not None and self.slots is not None:
            self.slots.give_back(buffer)

    def close(self) -> None:
        """Say that no more requests come, and wait for the store to let go."""
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
                    self._take_back(response.id)
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


def describe(error: grpc.RpcError) -> str:
    """What went wrong, in gRPC's words."""
    return f"{error.code().name}: {error.details()}"
