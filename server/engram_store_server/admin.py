"""Unary calls: what people and tools ask of a store beside its trainers."""

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc

from engram_store import snapshots, wire
from engram_store.errors import (
    CapacityError,
    ConfigError,
    EngramStoreError,
    FingerprintMismatchError,
    InputError,
    ProtocolError,
    ReadOnlyError,
    RowRangeError,
    SnapshotMismatchError,
    StoreClosedError,
    StoreExistsError,
    StoreFileError,
    StoreLockedError,
    StoreNotFoundError,
    TokenRangeError,
    UnknownStoreError,
)
from engram_store.layout.inspect import describe, description_json
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import check_pin_name
from engram_store.layout.verify import verify_store
from engram_store.session import SnapshotRef
from engram_store.v1 import store_pb2 as pb
from engram_store.v1 import store_pb2_grpc as pb_grpc
from engram_store_server.stores import ServedStore, Stores

_STATUS: tuple[tuple[type[EngramStoreError], grpc.StatusCode], ...] = (
    (TokenRangeError, grpc.StatusCode.OUT_OF_RANGE),
    (RowRangeError, grpc.StatusCode.OUT_OF_RANGE),
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownStoreError, grpc.StatusCode.NOT_FOUND),
    (StoreClosedError, grpc.StatusCode.UNAVAILABLE),
    (ReadOnlyError, grpc.StatusCode.PERMISSION_DENIED),
    (ProtocolError, grpc.StatusCode.FAILED_PRECONDITION),
    (FingerprintMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (SnapshotMismatchError, grpc.StatusCode.NOT_FOUND),
    (StoreNotFoundError, grpc.StatusCode.NOT_FOUND),
    (StoreExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (StoreFileError, grpc.StatusCode.DATA_LOSS),
    (StoreLockedError, grpc.StatusCode.ALREADY_EXISTS),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
)
"""First match counts; anything else is UNKNOWN."""
_LOOKING_THREADS = 2
_WORKING_THREADS = 4
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class _Restores:
    """Restores under way. Used on the event loop.

    One begins only while nobody trains, but a trainer may be admitted just then: it must not be
    welcomed with a step that is about to be forgotten.
    """

    def __init__(self) -> None:
        self._under_way: dict[str, set[asyncio.Event]] = {}
        """By name of the store."""

    def begin(self, name: str, threads: ThreadPoolExecutor, work: Callable[[], _T]) -> "Future[_T]":
        """Do `work` on a thread; from now on until its end the store goes back.

        A call that is given up does not end what its thread does, so the thread's end counts.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        events = self._under_way.setdefault(name, set())
        events.add(ended)

        def end() -> None:
            events.discard(ended)
            ended.set()

        def done(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # a loop that was closed has no trainers
                loop.call_soon_threadsafe(end)

        future = threads.submit(work)
        future.add_done_callback(done)
        return future

    async def end_within(self, name: str, seconds: float) -> bool:
        """Wait until none of a store is under way; whether none is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while events := self._under_way.get(name):
                    await next(iter(events)).wait()
        return not self._under_way.get(name)


class StoreAdministration(pb_grpc.StoreServiceServicer):
    """Everything of the service but sessions.

    Work is done on threads of its own, not on the event loop, and what takes long keeps nobody
    waiting who only looks: calls that look, calls that write, and the one verification at a time
    each have their threads.
    """

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._looking = ThreadPoolExecutor(_LOOKING_THREADS, "engram-look")
        self._working = ThreadPoolExecutor(_WORKING_THREADS, "engram-work")
        self._verifying = ThreadPoolExecutor(1, "engram-verify")
        self._restores = _Restores()

    async def ListStores(  # noqa: N802 - named by the protocol, here and below
        self, _request: pb.ListStoresRequest, context: Context
    ) -> pb.ListStoresResponse:
        """The stores that this process serves."""

        def summaries() -> pb.ListStoresResponse:
            stores = [served.summary() for served in self._stores.all()]
            return pb.ListStoresResponse(stores=stores)

        return await call(context, self._looking, summaries)

    async def CreateStore(  # noqa: N802
        self, request: pb.CreateStoreRequest, context: Context
    ) -> pb.CreateStoreResponse:
        """Make a new store beside the others, and serve it."""

        def create() -> pb.CreateStoreResponse:
            store = self._stores.create(request).store
            return pb.CreateStoreResponse(store_id=store.store_id)

        return await call(context, self._working, create)

    async def VerifyStore(  # noqa: N802
        self, request: pb.VerifyStoreRequest, context: Context
    ) -> pb.VerifyStoreResponse:
        """Read every file of the store and compare it with its checksums."""
        abandoned = threading.Event()

        def progress(_done: int, _total: int) -> None:
            self._stores.check_going_on()
            if abandoned.is_set():
                raise ProtocolError("given up: nobody waits for the report any more")

        def verify() -> pb.VerifyStoreResponse:
            paths = StorePaths(self._stores.find(request.store).store.path)
            report = verify_store(paths, progress=progress)
            return pb.VerifyStoreResponse(report_json=json.dumps(report.to_json()))

        try:
            return await call(context, self._verifying, verify)
        finally:  # cancelled, or past its deadline: others wait for the thread
            abandoned.set()

    async def RestoreSnapshot(  # noqa: N802
        self, request: pb.RestoreSnapshotRequest, context: Context
    ) -> pb.RestoreSnapshotResponse:
        """Go back to a snapshot; refused while somebody trains the store."""

        def restore(served: ServedStore) -> pb.RestoreSnapshotResponse:
            served.restore(_wanted(request.name, request.snapshot))
            return pb.RestoreSnapshotResponse(step=served.store.step)

        def begin() -> "Future[pb.RestoreSnapshotResponse]":
            served = self._stores.find(request.store)
            return self._restores.begin(served.name, self._working, lambda: restore(served))

        return await answer(context, begin)

    async def InspectStore(  # noqa: N802
        self, request: pb.InspectStoreRequest, context: Context
    ) -> pb.InspectStoreResponse:
        """What the store is, from its files."""

        def inspect() -> pb.InspectStoreResponse:
            paths = StorePaths(self._stores.find(request.store).store.path)
            description = description_json(describe(paths))
            return pb.InspectStoreResponse(description_json=json.dumps(description))

        return await call(context, self._looking, inspect)

    async def GetStatistics(  # noqa: N802
        self, request: pb.GetStatisticsRequest, context: Context
    ) -> pb.GetStatisticsResponse:
        """Counters since the process opened the store."""

        def count() -> pb.GetStatisticsResponse:
            stats = self._stores.find(request.store).store.stats()
            return pb.GetStatisticsResponse(statistics_json=json.dumps(asdict(stats)))

        return await call(context, self._looking, count)

    async def CreateSnapshot(  # noqa: N802
        self, request: pb.CreateSnapshotRequest, context: Context
    ) -> pb.CreateSnapshotResponse:
        """Keep the tables as they are now."""

        def snapshot() -> pb.CreateSnapshotResponse:
            served = self._stores.find(request.store)
            if request.pin:
                check_pin_name(request.pin)
            ref = served.store.snapshot()
            served.durable_changed()
            if request.pin:
                snapshots.pin(served.store.path, ref, request.pin)
            return pb.CreateSnapshotResponse(snapshot=wire.encode_ref(ref))

        return await call(context, self._working, snapshot)

    async def ListSnapshots(  # noqa: N802
        self, request: pb.ListSnapshotsRequest, context: Context
    ) -> pb.ListSnapshotsResponse:
        """Steps that have a snapshot."""

        def steps() -> pb.ListSnapshotsResponse:
            store = self._stores.find(request.store).store
            if not request.details:
                return pb.ListSnapshotsResponse(steps=store.snapshots())
            found = snapshots.describe(store.path)
            return pb.ListSnapshotsResponse(
                steps=[info.step for info in found],
                details_json=json.dumps([info.to_json() for info in found]),
            )

        return await call(context, self._looking, steps)

    async def PinSnapshot(  # noqa: N802
        self, request: pb.PinSnapshotRequest, context: Context
    ) -> pb.PinSnapshotResponse:
        """Keep a snapshot from being removed, under a name."""

        def pin() -> pb.PinSnapshotResponse:
            path = self._stores.find(request.store).store.path
            wanted = _wanted(request.name, request.snapshot)
            ref = snapshots.pin(path, wanted, request.pin, move=request.move)
            return pb.PinSnapshotResponse(snapshot=wire.encode_ref(ref))

        return await call(context, self._working, pin)

    async def UnpinSnapshot(  # noqa: N802
        self, request: pb.UnpinSnapshotRequest, context: Context
    ) -> pb.UnpinSnapshotResponse:
        """Take a name away."""

        def unpin() -> pb.UnpinSnapshotResponse:
            snapshots.unpin(self._stores.find(request.store).store.path, request.pin)
            return pb.UnpinSnapshotResponse()

        return await call(context, self._working, unpin)

    async def CollectGarbage(  # noqa: N802
        self, request: pb.CollectGarbageRequest, context: Context
    ) -> pb.CollectGarbageResponse:
        """Remove older snapshots, and files that nothing needs."""

        def collect() -> pb.CollectGarbageResponse:
            store = self._stores.find(request.store).store
            keep = request.keep if request.HasField("keep") else None
            report = store.collect_garbage(keep, dry_run=request.dry_run)
            return pb.CollectGarbageResponse(report_json=json.dumps(report.to_json()))

        return await call(context, self._working, collect)

    async def SealStore(  # noqa: N802
        self, request: pb.SealStoreRequest, context: Context
    ) -> pb.SealStoreResponse:
        """Write the open memtable to disk."""
        await call(context, self._working, lambda: self._stores.find(request.store).store.seal())
        return pb.SealStoreResponse()

    async def FoldStore(  # noqa: N802
        self, request: pb.FoldStoreRequest, context: Context
    ) -> pb.FoldStoreResponse:
        """Write segments into a new base generation."""
        await call(context, self._working, lambda: self._stores.find(request.store).store.fold())
        return pb.FoldStoreResponse()


def _wanted(name: str, ref: pb.SnapshotRef) -> SnapshotRef | int | str:
    """The snapshot that a request names."""
    wanted = wire.decode_ref(ref)
    return name or (wanted if wanted.digest else wanted.step)


async def call(context: Context, threads: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
    """Do blocking work on a thread; an error becomes the call's status."""
    return await answer(context, lambda: threads.submit(work))


async def answer(context: Context, begin: Callable[[], "Future[_T]"]) -> _T:
    """The result of what `begin` has begun; an error of either becomes the call's status."""
    try:
        return await asyncio.wrap_future(begin())
    except EngramStoreError as error:
        failed = error
    except Exception as error:
        _logger.exception("a call failed")
        failed = EngramStoreError(f"internal error in the store ({error!r}); its log has more")
    return await refuse(context, failed)


async def refuse(context: Context, error: EngramStoreError) -> NoReturn:
    """End a call with an error that the client can raise again."""
    unknown = grpc.StatusCode.UNKNOWN
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), unknown)
    failure = wire.encode_error(error)
    await context.abort(status, failure.message, ((wire.FAILURE_KEY, failure.SerializeToString()),))
    raise AssertionError("abort raises")
