"""One store process from its start to its end.

Start: listen, answer health checks with NOT_SERVING, open the stores in a thread (which recovers
what a killed process left), then serve. The end is in `_shut_down`.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engram_store.chunks import CHANNEL_OPTIONS
from engram_store.errors import ConfigError
from engram_store.slots import slot_door
from engram_store.store import Store
from engram_store_server.allocator import keep_freed_memory
from engram_store_server.config import ServerConfig
from engram_store_server.creation import StoreMaker
from engram_store_server.gate import SERVICE, StoreGate
from engram_store_server.home import StoreHome, find_stores, open_stores
from engram_store_server.rules import split_address
from engram_store_server.servicer import StoreServicer
from engram_store_server.socket_path import claim_socket
from engram_store_server.stores import Stores
from engram_store_server.tls import server_credentials

_logger = logging.getLogger(__name__)
_OTHER_CALLS = 64
"""Calls at once besides sessions: health checks, administration."""
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True, slots=True)
class _Front:
    """What listens, whether or not there is a store behind it."""

    server: grpc.aio.Server
    health: health.aio.HealthServicer
    gate: StoreGate

    async def set_health(self, status: int) -> None:
        for service in ("", SERVICE):
            await self.health.set(service, status)


def run(config: ServerConfig) -> None:
    """`serve` in an event loop of its own: uvloop's, where it is installed.

    Raises:
        As `serve`.
    """
    keep_freed_memory()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(config))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def serve(config: ServerConfig) -> None:
    """Serve a store, or the stores of a directory, until SIGTERM or SIGINT, then close them.

    Raises:
        StoreNotFoundError, StoreLockedError, StoreFileError: one cannot be opened; it is named.
        CapacityError: there is no room for its memtables, or to close it; applied steps stay in
            shared memory for the next start.
        ConfigError: the socket or the address cannot be listened on, or a TLS file cannot be used.
    """
    stop = _stop_on_signals()
    credentials = server_credentials(config)
    home = find_stores(config.data_dir)
    with home.claim(), claim_socket(config.socket_path):
        front, addresses = await _listen(config, credentials)
        try:
            _logger.info("opening %s", config.data_dir)
            opened = await asyncio.to_thread(_open, config, home)
        except BaseException:
            await front.server.stop(None)
            raise
        ready = _ready_line(home, opened, addresses)
        maker = StoreMaker(home, config) if home.several else None
        stores = Stores(opened, config.limits, maker)
        servicer = StoreServicer(stores, config.limits, door=slot_door(config.socket_path))
        try:
            await _serve_until(stop, front, servicer, ready)
        finally:
            await _shut_down(config, front, servicer, stores)


def _stop_on_signals() -> asyncio.Event:
    """An event that is set when the process is asked to end."""
    stop = asyncio.Event()

    def ask(number: signal.Signals) -> None:
        _logger.info("%s: stopping", number.name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ask, number)
    return stop


async def _serve_until(
    stop: asyncio.Event, front: _Front, servicer: StoreServicer, ready: str
) -> None:
    if stop.is_set():  # while the store was being opened
        return
    front.gate.open(servicer)
    await front.set_health(_SERVING)
    sys.stdout.write(ready + "\n")
    sys.stdout.flush()
    await stop.wait()


async def _shut_down(
    config: ServerConfig, front: _Front, servicer: StoreServicer, stores: Stores
) -> None:
    """The one order in which a store process ends.

    1. Health checks say NOT_SERVING, so that nobody is sent here any more.
    2. New calls are refused; health checks are still answered.
    3. Sessions end after the answers they have ready: a stream has no end of its own to wait for.
    4. Calls under way may finish for `drain_seconds`; what is left then is cancelled.
    5. The stores close, also when one of them cannot: memtables are sealed, and the step of each
       becomes a snapshot.
    """
    await front.set_health(_NOT_SERVING)
    front.gate.close()
    servicer.stop()
    if left := await front.gate.drain(config.drain_seconds):
        _logger.warning("%d calls did not end in %g s", left, config.drain_seconds)
    await front.server.stop(None)
    _logger.info("closing %s", config.data_dir)
    await asyncio.to_thread(stores.close)


# ---------------------------------------------------------------------- the server


async def _listen(
    config: ServerConfig, credentials: grpc.ServerCredentials | None
) -> tuple[_Front, list[str]]:
    """A server that answers health checks; with the addresses it listens on.

    Raises:
        ConfigError: an address cannot be listened on.
    """
    gate = StoreGate(config.max_sessions)
    server = grpc.aio.server(
        options=_options(config),
        maximum_concurrent_rpcs=config.max_sessions + _OTHER_CALLS,
    )
    front = _Front(server, health.aio.HealthServicer(), gate)
    health_pb2_grpc.add_HealthServicer_to_server(front.health, server)
    server.add_generic_rpc_handlers((gate,))
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    await front.set_health(_NOT_SERVING)
    addresses = _bind(server, config, credentials)
    await server.start()
    return front, addresses


def _bind(
    server: grpc.aio.Server, config: ServerConfig, credentials: grpc.ServerCredentials | None
) -> list[str]:
    """Raises: ConfigError."""
    path = config.socket_path
    _add_port(server, f"unix:{path}")
    path.chmod(0o600)
    addresses = [f"unix:{path.absolute()}"]
    if config.tcp is not None:
        host = split_address(config.tcp)[0]
        port = _add_port(server, config.tcp, credentials)
        addresses.append(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
    return addresses


def _add_port(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None
) -> int:
    """Raises: ConfigError."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {error}") from None


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    """GRPC's settings, each named in its own documentation."""
    keepalive_ms = round(1000 * config.keepalive_seconds)
    return [
        *CHANNEL_OPTIONS,
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_sessions + _OTHER_CALLS),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ask for signs of life too, as often as we do.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", keepalive_ms // 2),
        # TLS included: who connects and says nothing holds a place for no longer.
        ("grpc.server_handshake_timeout_ms", round(1000 * config.hello_seconds)),
        # Two processes must never share a port without knowing.
        ("grpc.so_reuseport", 0),
    ]


# ---------------------------------------------------------------------- the stores


def _open(config: ServerConfig, home: StoreHome) -> dict[str, Store]:
    return open_stores(home, config)


def _ready_line(home: StoreHome, opened: dict[str, Store], addresses: list[str]) -> str:
    what = f"{len(opened)} store{'s' * (len(opened) != 1)}"
    if not home.several:
        what = f"step {next(iter(opened.values())).step}"
    return f"engram-store: serving {home.root} ({what}) on {' and '.join(addresses)}"
