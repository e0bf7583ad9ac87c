"""The stores of one process, by name."""

import threading
from collections.abc import Mapping

from engram_store.errors import ProtocolError, StoreClosedError, UnknownStoreError
from engram_store.session import SnapshotRef
from engram_store.store import Store
from engram_store.v1 import store_pb2 as pb
from engram_store_server.creation import StoreMaker, decode_creation
from engram_store_server.home import close_stores
from engram_store_server.jobs import Trainers
from engram_store_server.limits import SessionLimits
from engram_store_server.session import SessionServer


class ServedStore:
    """A store that is open for training, and who is connected to it."""

    def __init__(self, name: str, store: Store, limits: SessionLimits) -> None:
        self.name, self.store = name, store
        self.trainers = Trainers(limits.handover_seconds)
        self.sessions: set[SessionServer] = set()
        store.when_durable(lambda _step: self.durable_changed())
        self.restores = 0
        """How often the store went back to a snapshot."""

    @property
    def durable_step(self) -> int:
        """Steps that outlive the host."""
        return self.store.durable_step

    @property
    def staleness(self) -> int:
        """Steps by which rows may lag behind."""
        return self.store.staleness

    def durable_changed(self) -> None:
        """Tell every session how far its steps outlive the host; from any thread."""
        notice = pb.SessionResponse(durable=pb.Durable(step=self.durable_step))
        for session in list(self.sessions):
            session.notify(notice)

    def restore(self, snapshot: SnapshotRef | int | str) -> None:
        """Go back to a snapshot for nobody in particular.

        Raises:
            ProtocolError: somebody trains the store, or a newer snapshot is pinned. As
            `Store.restore`.
        """
        if self.trainers.connected:
            raise ProtocolError(
                "the store is being trained; end the training, or let the trainer restore"
            )
        self.store.restore(snapshot)
        self.restored()

    def restored(self) -> None:
        """The store went back to a snapshot."""
        self.restores += 1
        self.durable_changed()

    def summary(self) -> pb.StoreSummary:
        """For a list."""
        sessions = list(self.sessions)  # copied at once: the event loop changes it
        trainers = sum(session.trains for session in sessions)
        return pb.StoreSummary(
            name=self.name,
            store_id=self.store.store_id,
            step=self.store.step,
            fingerprint=self.store.metadata.fingerprint,
            readers=len(sessions) - trainers,
            trainers=trainers,
        )


class Stores:
    """What a process serves; used from any thread.

    Args:
        stores: open for training, by name; `close` closes them.
        limits: of every session.
        maker: makes more of them; None: this process serves the one it was started for.
    """

    def __init__(
        self, stores: Mapping[str, Store], limits: SessionLimits, maker: StoreMaker | None = None
    ) -> None:
        self._limits, self._maker = limits, maker
        # Replaced when a store is added, never changed, so that readers need no lock.
        self._served = {name: ServedStore(name, store, limits) for name, store in stores.items()}
        self._lock = threading.Lock()
        self._ending = threading.Event()

    def find(self, name: str) -> ServedStore:
        """A store by its name; the only one if the name is empty.

        Raises:
            UnknownStoreError: none of that name, or not exactly one and no name.
        """
        served = self._served
        if not name and len(served) == 1:
            return next(iter(served.values()))
        if name not in served:
            raise UnknownStoreError(name, sorted(served))
        return served[name]

    def all(self) -> list[ServedStore]:
        """In the order of their names."""
        served = self._served
        return [served[name] for name in sorted(served)]

    def create(self, request: pb.CreateStoreRequest) -> ServedStore:
        """Make a store and serve it.

        Raises:
            ProtocolError: this process serves one store, or the token map is not an array.
            StoreClosedError: the process stops.
            ConfigError, StoreExistsError, CapacityError: see `decode_creation` and
                `StoreMaker.make`. Nothing was made, here as above.
        """
        if self._maker is None:
            raise ProtocolError(
                f"this process serves one store, {', '.join(self._served)}, and makes no others; "
                "start `engram-store serve` with a directory of stores, or use `engram-store "
                "create`"
            )
        creation = decode_creation(request)
        sharers = len(self._served) + 1
        store = self._maker.make(creation, sharers=sharers, go_on=self.check_going_on)
        served = ServedStore(creation.name, store, self._limits)
        with self._lock:
            if not self._ending.is_set():
                self._served = {**self._served, creation.name: served}
                return served
        store.close()
        raise StoreClosedError(f"{creation.name} was made, but {_ENDING}")

    def check_going_on(self) -> None:
        """Raises: StoreClosedError: the process stops; long work is to be given up."""
        if self._ending.is_set():
            raise StoreClosedError(f"given up: {_ENDING}")

    def end_sessions(self) -> None:
        """Let every session end after the answers that are ready, and long work be given up."""
        with self._lock:
            self._ending.set()
        for served in self.all():
            for session in served.sessions:
                session.end()

    def close(self) -> None:
        """Close every store; see `close_stores`."""
        with self._lock:
            self._ending.set()
        close_stores({served.name: served.store for served in self.all()})


_ENDING = "the store process is stopping; try again when it was started again"
