"""What people and programs ask of a store process beside its trainers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Self, TypeVar

import grpc

from engram_store import Normal, wire
from engram_store.engine.garbage import GarbageReport, check_keep, decode_report
from engram_store.errors import ConfigError, ProtocolError, StoreUnreachableError
from engram_store.layout.documents import parse_json
from engram_store.layout.usage import SnapshotInfo, decode_snapshots
from engram_store.recipes import Recipe
from engram_store.session import SnapshotRef
from engram_store.stats import StoreStats
from engram_store.types import NonFinitePolicy, OptimizerKind, RowDtype
from engram_store.v1 import store_pb2 as pb
from engram_store.v1.store_pb2_grpc import StoreServiceStub
from engram_store_client.remote.credentials import ClientTls, explain_plain_text
from engram_store_client.remote.statistics import decode_statistics
from engram_store_client.remote.unary import ask

_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    # A verification may take hours; a store that has gone must not look like a busy one.
    ("grpc.keepalive_time_ms", 1000 * wire.KEEPALIVE_SECONDS),
    ("grpc.keepalive_timeout_ms", 1000 * wire.KEEPALIVE_SECONDS),
]
_Response = TypeVar("_Response")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSummary:
    """One store of a process."""

    name: str
    store_id: str
    step: int
    """Steps applied."""
    fingerprint: str
    readers: int
    """Connected sessions that only read."""
    trainers: int
    """Connected sessions that train: the ranks of one job."""


class Administration:
    """Calls of one store process; made by `connect_admin`. May be used by several threads.

    Every method asks once and waits for the answer. All raise:

        StoreUnreachableError: no store process answers there, or it went away meanwhile.
        DeadlineError: it took too long; whether it was done is unknown.
        ProtocolError: what answers there does not take the call, or the two do not agree on TLS.

    and, where a method takes `store` (a name; empty: the only one), UnknownStoreError. What the
    store raises comes back as the same class.

    Args:
        address: `unix:path`, or `host:port`.
        tls: certificates, as they are now; None: in the clear.
        deadline_seconds: for an answer that takes the store no work.
        work_seconds: for snapshots, restores, seals, folds, creations and verifications.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: ClientTls | None = None,
        deadline_seconds: float = 60.0,
        work_seconds: float = 3600.0,
    ) -> None:
        for seconds in (deadline_seconds, work_seconds):
            if not (isfinite(seconds) and seconds > 0):
                raise ConfigError(f"deadlines must be finite and positive, got {seconds} seconds")
        self._address, self._tls = address, tls
        self._deadline_seconds, self._work_seconds = deadline_seconds, work_seconds
        if tls is None:
            self._channel = grpc.insecure_channel(address, _CHANNEL_OPTIONS)
        else:
            self._channel = tls.open_channel(address, _CHANNEL_OPTIONS)
        self._stub = StoreServiceStub(self._channel)

    def list_stores(self) -> list[StoreSummary]:
        """The stores that the process serves, in the order of their names."""
        response = self._look(self._stub.ListStores, pb.ListStoresRequest(), "the stores")
        return [
            StoreSummary(
                name=entry.name,
                store_id=entry.store_id,
                step=entry.step,
                fingerprint=entry.fingerprint,
                readers=entry.readers,
                trainers=entry.trainers,
            )
            for entry in response.stores
        ]

    def create_store(
        self,
        name: str,
        recipe: Recipe,
        *,
        dim: int,
        dtype: RowDtype | str = RowDtype.BFLOAT16,
        optimizer: OptimizerKind | str = OptimizerKind.ROWWISE_ADAGRAD,
        initial: Normal | None = None,
        stochastic_rounding: bool = True,
        on_nonfinite: NonFinitePolicy | str = NonFinitePolicy.REJECT,
        seed: int = 0,
        per_layer: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> str:
        """Make a store beside the others of a process that serves a directory of stores.

        It can be trained at once: `connect(url, store=name)`.

        Args:
            name: of its directory: letters, digits, dots, dashes and underscores, at most 100.
            recipe, dim, dtype, optimizer, initial, stochastic_rounding, on_nonfinite, seed,
                per_layer: as for `engram_store.create`.

        Returns:
            Its `store_id`.

        Raises:
            ProtocolError: the process serves a single store.
            StoreExistsError: something has that name.
            ConfigError: the name, the recipe or an argument is not allowed.
            CapacityError: tables do not fit on the disk, or memtables in memory. Nothing was
                made, here as above.
        """
        options = {
            "dim": dim,
            "dtype": dtype,
            "optimizer": optimizer,
            "initial": initial and {"std": initial.std, "seed": initial.seed},
            "stochastic_rounding": stochastic_rounding,
            "on_nonfinite": on_nonfinite,
            "seed": seed,
            "per_layer": {str(layer): dict(own) for layer, own in (per_layer or {}).items()},
        }
        try:
            options_json = json.dumps(options)
        except TypeError as error:
            raise ConfigError(f"an argument of the store cannot be sent: {error}") from None
        request = pb.CreateStoreRequest(
            store=name,
            recipe_json=json.dumps(recipe.to_json()),
            token_map=None if recipe.token_map is None else wire.encode_array(recipe.token_map),
            options_json=options_json,
        )
        return self._work(self._stub.CreateStore, request, f"creation of {name}").store_id

    def inspect(self, store: str = "") -> dict[str, Any]:
        """What a store is: what `engram-store inspect --json` prints.

        Raises:
            StoreFileError.
        """
        request = pb.InspectStoreRequest(store=store)
        response = self._look(self._stub.InspectStore, request, "a description")
        return _record("description", response.description_json)

    def statistics(self, store: str = "") -> StoreStats:
        """Counters since the process opened the store."""
        request = pb.GetStatisticsRequest(store=store)
        response = self._look(self._stub.GetStatistics, request, "statistics")
        return decode_statistics(response.statistics_json)

    def snapshot(self, store: str = "", *, pin: str | None = None) -> SnapshotRef:
        """Keep the tables as they are now; a store that is being trained goes on.

        Args:
            store: which one.
            pin: name to pin it under.

        Raises:
            CapacityError: the disk is full.
            ConfigError: it cannot be pinned under that name.
        """
        request = pb.CreateSnapshotRequest(store=store, pin=pin or "")
        return wire.decode_ref(
            self._work(self._stub.CreateSnapshot, request, "a snapshot").snapshot
        )

    def snapshots(self, store: str = "") -> list[int]:
        """Steps that have a snapshot, ascending."""
        request = pb.ListSnapshotsRequest(store=store)
        return list(self._look(self._stub.ListSnapshots, request, "the snapshots").steps)

    def describe_snapshots(self, store: str = "") -> list[SnapshotInfo]:
        """The snapshots with their sizes and pins, oldest first."""
        request = pb.ListSnapshotsRequest(store=store, details=True)
        response = self._look(self._stub.ListSnapshots, request, "the snapshots")
        return _decoded("snapshots", response.details_json, decode_snapshots)

    def pin(
        self, snapshot: SnapshotRef | int | str, name: str, store: str = "", *, move: bool = False
    ) -> SnapshotRef:
        """Keep a snapshot from being removed; see `engram_store.snapshots.pin`.

        Raises:
            ConfigError: not a name, or another snapshot has it.
            SnapshotMismatchError: it has no such snapshot.
        """
        ref, known_as = _named(snapshot)
        request = pb.PinSnapshotRequest(
            store=store, pin=name, snapshot=ref, name=known_as, move=move
        )
        return wire.decode_ref(self._work(self._stub.PinSnapshot, request, "a pin").snapshot)

    def unpin(self, name: str, store: str = "") -> None:
        """Take a pin away. Raises: SnapshotMismatchError: nothing is pinned under that name."""
        self._work(
            self._stub.UnpinSnapshot, pb.UnpinSnapshotRequest(store=store, pin=name), "an unpin"
        )

    def collect_garbage(
        self, keep: int | None = None, store: str = "", *, dry_run: bool = False
    ) -> GarbageReport:
        """Remove older snapshots, and files that nothing needs; see `Store.collect_garbage`.

        Raises:
            ConfigError: `keep` is less than 1.
            StoreFileError: a snapshot or a pin is damaged; files stay where that is so.
        """
        check_keep(keep)
        request = pb.CollectGarbageRequest(store=store, keep=keep, dry_run=dry_run)
        response = self._work(self._stub.CollectGarbage, request, "garbage collection")
        return _decoded("report", response.report_json, decode_report)

    def restore(self, snapshot: SnapshotRef | int | str, store: str = "") -> int:
        """Go back to a snapshot, by its step or a name too; everything newer is forgotten.

        Returns:
            The step that the store is at.

        Raises:
            ProtocolError: somebody trains the store, or a newer snapshot is pinned.
            SnapshotMismatchError: it has no such snapshot. Nothing changed, here as above.
        """
        ref, name = _named(snapshot)
        request = pb.RestoreSnapshotRequest(store=store, snapshot=ref, name=name)
        return self._work(self._stub.RestoreSnapshot, request, "a restore").step

    def verify(self, store: str = "") -> dict[str, Any]:
        """Read every file of a store and compare it with its checksums; it may be trained.

        Returns:
            What `engram-store verify --json` prints: 'ok', 'damages', and more.
        """
        request = pb.VerifyStoreRequest(store=store)
        response = self._work(self._stub.VerifyStore, request, "a verification")
        return _record("report", response.report_json)

    def seal(self, store: str = "") -> None:
        """Write what is in shared memory to disk. Raises: CapacityError: the disk is full."""
        self._work(self._stub.SealStore, pb.SealStoreRequest(store=store), "a seal")

    def fold(self, store: str = "") -> None:
        """Write segments into new base tables. Raises: CapacityError: the disk is full."""
        self._work(self._stub.FoldStore, pb.FoldStoreRequest(store=store), "a fold")

    def close(self) -> None:
        """Hang up; what is under way fails with StoreUnreachableError."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _look(self, method: Callable[..., _Response], request: Any, asked: str) -> _Response:
        return self._ask(method, request, asked, self._deadline_seconds)

    def _work(self, method: Callable[..., _Response], request: Any, asked: str) -> _Response:
        return self._ask(method, request, asked, self._work_seconds)

    def _ask(
        self, method: Callable[..., _Response], request: Any, asked: str, seconds: float
    ) -> _Response:
        try:
            return ask(method, request, self._address, asked=asked, seconds=seconds)
        except StoreUnreachableError as error:
            if self._address.startswith("unix:"):
                raise
            explain = explain_plain_text if self._tls is None else self._tls.explain
            reason = explain(self._address)
            if reason is None:
                raise
            raise ProtocolError(f"no call to the store at {self._address}: {reason}") from error


def _named(snapshot: SnapshotRef | int | str) -> tuple[pb.SnapshotRef, str]:
    """A snapshot as requests name it: a reference, or a name."""
    if isinstance(snapshot, str):
        return pb.SnapshotRef(), snapshot
    if isinstance(snapshot, int):
        return pb.SnapshotRef(step=snapshot), ""
    return wire.encode_ref(snapshot), ""


def _decoded(what: str, text: str, decode: Callable[[Any], _Response]) -> _Response:
    """Raises: ProtocolError."""
    try:
        return decode(parse_json(text))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the store's {what} cannot be read ({error!r:.200}); is it of another version?"
        ) from error


def _record(what: str, text: str) -> dict[str, Any]:
    """A JSON object. Raises: ProtocolError."""
    try:
        record = parse_json(text)
    except ValueError as error:
        raise ProtocolError(f"the store's {what} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ProtocolError(
            f"the store's {what} is {record!r:.100}, not a JSON object; is it of another version?"
        )
    return record
