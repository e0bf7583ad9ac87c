"""A session with a store in another process."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, Self

import grpc
import numpy as np

from engram_store import wire
from engram_store.errors import (
    CapacityError,
    ConfigError,
    DuplicateStepError,
    EngramStoreError,
    MissingGradientError,
    ProtocolError,
    ReadOnlyError,
    StepGapError,
    StoreUnreachableError,
    WindowClosedError,
)
from engram_store.recipes import Recipe
from engram_store.session import Applied, SnapshotRef
from engram_store.stats import StoreStats
from engram_store.types import TableSpec, TokenIds
from engram_store.v1 import store_pb2 as pb
from engram_store_client.devices.host_memory import assign
from engram_store_client.remote.committing import Commits
from engram_store_client.remote.connection import Connection
from engram_store_client.remote.credentials import ClientTls
from engram_store_client.remote.credit import Credit
from engram_store_client.remote.messages import (
    commit_message,
    rates_by_layer,
    read_welcome,
)
from engram_store_client.remote.options import RemoteOptions
from engram_store_client.remote.pending import Pending
from engram_store_client.remote.statistics import fetch_statistics
from engram_store_client.remote.stream import Stream, open_channel
from engram_store_client.remote.waiting import Waiting
from engram_store_client.remote.window import RemoteWindow

if TYPE_CHECKING:
    from engram_store_client.remote.administration import Administration

Mode = Literal["read", "train"]
_NOTICE_SECONDS = 1.0
"""How much later than a unary call the stream may learn that the store is gone."""
_MODES = {"read": pb.MODE_READ, "train": pb.MODE_TRAIN}


class RemoteSession:
    """Implements `session.Session` over gRPC; made by `connect`.

    One thread trains (announces, pushes, commits); windows that are only read may be announced
    and read by other threads too. If the store goes away and comes back with every step that it
    had acknowledged, nobody here notices but by the time it takes.

    Args:
        address: `unix:path`, or `host:port`.
        mode: what the session may do; one session at a time trains a store.
        options: deadlines.
        credentials: of a TLS connection; None: in the clear.

    Raises:
        StoreUnreachableError: nothing answers there.
        ProtocolError: the store refused: another session trains it, or it speaks another
            protocol.
    """

    def __init__(
        self,
        address: str,
        mode: Mode = "train",
        options: RemoteOptions | None = None,
        *,
        credentials: grpc.ChannelCredentials | ClientTls | None = None,
    ) -> None:
        if mode not in _MODES:
            raise ConfigError(f"mode must be one of {sorted(_MODES)}, got {mode!r}")
        self._address, self._mode, self._credentials = address, mode, credentials
        self._options = options or RemoteOptions()
        self._numbers = itertools.count(1)
        # Guards the open training windows, and keeps announcements in the order of their numbers.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._windows: dict[int, RemoteWindow] = {}
        hello = pb.Hello(
            protocol=wire.PROTOCOL,
            oldest_protocol=wire.OLDEST_PROTOCOL,
            mode=_MODES[mode],
            session_id=self._options.session_id(),
            shared_memory=self._options.shared_memory and address.startswith("unix:"),
            store=self._options.store,
            rank=self._options.rank,
            world_size=self._options.world_size,
        )
        self.connection = Connection(
            address, self._open_stream, hello, self._options, self._on_answer
        )
        try:
            self._store_id, self._recipe, self._tables = read_welcome(self.connection.welcome)
        except EngramStoreError:
            self.connection.close()
            raise
        assign(self, self.connection.shared)
        self.commits = Commits(self.connection, self._tables, self._take_back)
        self.waiting = Waiting(self._tables)
        self._credit = Credit[RemoteWindow](self.connection.welcome.credits, RemoteWindow.send)

    def _open_stream(self, hello: pb.SessionRequest, *callbacks: Any) -> Stream:
        channel = open_channel(self._address, self._credentials)
        return Stream(self._address, channel, hello, *callbacks)

    # ------------------------------------------------------------------ what it is

    @property
    def transport(self) -> str:
        """How rows and gradients travel: 'shared memory' or 'messages'."""
        return "shared memory" if self.connection.shares_memory else "messages"

    @property
    def store_id(self) -> str:
        """Names the store for its whole life."""
        return self._store_id

    @property
    def recipe(self) -> Recipe:
        """How tokens become rows."""
        return self._recipe

    @property
    def tables(self) -> Mapping[int, TableSpec]:
        """The tables, by layer."""
        return self._tables

    @property
    def step(self) -> int:
        """See `session.Session.step`; as far as this session was told."""
        under_way = self.commits.under_way
        return self.connection.step if under_way is None else under_way + 1

    @property
    def staleness(self) -> int:
        """Steps by which the store's rows may lag behind, as it was started; 0 is exact."""
        return self.connection.staleness

    @property
    def durable_step(self) -> int:
        """See `session.Session.durable_step`; as far as this session was told."""
        return self.connection.durable_step

    @property
    def world_size(self) -> int:
        """See `session.Session.world_size`."""
        return self._options.world_size

    def _check_trains(self, *, alone: bool = False) -> None:
        """For calls that write; `alone` waits for a commit under way.

        Raises: ReadOnlyError, and see `Connection.check`.
        """
        self.connection.check()
        if self._mode != "train":
            raise ReadOnlyError("the session was opened with mode='read'; use mode='train'")
        if alone:
            self.commits.settle()
            self.connection.check()

    # ------------------------------------------------------------------ windows

    def announce(
        self,
        tokens: TokenIds,
        step: int | None = None,
        *,
        context: TokenIds | None = None,
        attention_mask: TokenIds | None = None,
    ) -> RemoteWindow:
        """See `session.Session.announce`."""
        self.connection.check()
        if step is not None:
            self._check_trains()
            if step < self.step:
                raise DuplicateStepError(step, self.step)
        # Checked here, so that bad input fails at once.
        self.recipe.carry(tokens, context, attention_mask=attention_mask)
        masked = attention_mask is not None and self.recipe.rules.masks_padding
        with self._lock:
            window = RemoteWindow(
                self,
                next(self._numbers),
                step,
                np.array(tokens, np.int64),
                None if context is None else np.array(context, np.int64),
                np.asarray(attention_mask) != 0 if masked else None,
            )
            if step is not None:
                self._windows[window.number] = window
            self._announce(window)
        return window

    def _announce(self, window: RemoteWindow) -> None:
        """Send it when there is credit. Raises: CapacityError: there never is."""
        cost = wire.session_cost(
            self.recipe, self.tables, window.tokens.size, trains=window.step is not None
        )
        try:
            self._credit.submit(window.number, cost, window)
        except CapacityError:
            self._windows.pop(window.number, None)
            raise

    def wait_until_sent(self, window: RemoteWindow) -> None:
        """Wait for credit that other windows take.

        Raises:
            CapacityError: they keep it; only a commit, which waits for this window, would end
                them, or nobody closed them in time.
            EngramStoreError: what a commit under way raised.
        """
        if window.announced is None:
            self.commits.wait_for(window.step)  # its windows take credit
        with self._changed:
            refusal = self._credit.refusal(window.number)
            if refusal is None:
                return
            ends_by_commit = self._credit.holders <= self._windows.keys()
            hopeless = window.step == self.step and ends_by_commit
            seconds = 0 if hopeless else self._options.deadline_seconds
            if not self._changed.wait_for(
                lambda: window.announced is not None or window.closed, seconds
            ):
                raise refusal

    def release(self, window: RemoteWindow) -> None:
        """Tell the store that a closed window is not needed; waits for nothing."""
        self.connection.forget({window.number})
        # Closed, lost or in another process: then nobody is there to be told.
        with contextlib.suppress(EngramStoreError):
            if window.announced is not None:
                release = pb.Release(window=window.number)
                self.connection.send(pb.SessionRequest(release=release))
        with self._lock:
            self._windows.pop(window.number, None)
            self._return_credit([window])

    def _return_credit(self, windows: Sequence[RemoteWindow]) -> None:
        """Send the announcements that waited for it. The lock is held."""
        for window in windows:
            self._credit.give_back(window.number)
        with contextlib.suppress(EngramStoreError):
            self._credit.send_waiting()
        self._changed.notify_all()

    def may_read(self, step: int) -> bool:
        """Whether rows of a step's windows can be had now, or after the commit under way."""
        applied = self.connection.step
        return step == self.step or applied <= step <= applied + self.staleness

    def _on_answer(self, pending: Pending, response: pb.SessionResponse) -> None:
        """Close the windows that the store has closed."""
        match response.WhichOneof("response"):
            case "applied":
                self._end_windows(response.applied.step)
            case "restored":
                self._end_windows(None)
            case "failure" if pending.kind == "read":
                if response.failure.error == WindowClosedError.__name__:
                    self._closed_there(pending.window)

    def _closed_there(self, number: int | None) -> None:
        """The store closed a window, because a commit failed that had given it rows.

        One that it never had stays open here: its step is not to go on without it.
        """
        with self._lock:
            window = self._windows.get(-1 if number is None else number)
        if window is None or window.announced is None:
            return
        if window.announced.has_answer("announced"):
            window.close()

    def _end_windows(self, step: int | None) -> None:
        """The training windows of a step, or all of them; the store has closed them itself."""
        with self._lock:
            ended = [w for w in self._windows.values() if step is None or w.step == step]
            for window in ended:
                window.closed = True
                del self._windows[window.number]
        self.connection.forget({window.number for window in ended})
        with self._lock:
            self._return_credit(ended)

    # ------------------------------------------------------------------ committing

    def _pending(self) -> list[RemoteWindow]:
        with self._lock:
            return [w for w in self._windows.values() if w.step == self.step]

    def gradient_norm(self) -> float:
        """See `session.Session.gradient_norm`."""
        self._check_trains(alone=True)
        request = pb.SessionRequest(gradient_norm=pb.GradientNorm())
        pending = self.connection.send(request)
        return self.commits.result(pending, "gradient norm", self._pending()).norm.value

    def commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> Applied:
        """See `session.Session.commit`."""
        return self._order(step, lr, gradient_scale, eps, betas, early=False)()

    def begin_commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> "Future[Applied]":
        """See `session.Session.begin_commit`.

        What the store itself refuses is raised by the result. Of several ranks all have to begin a
        step's commit like this; otherwise rows of the next one come after it.
        """
        finish = self._order(step, lr, gradient_scale, eps, betas, early=True)
        return self.commits.begin(step, finish)

    def _order(
        self,
        step: int,
        lr: float | Mapping[int, float],
        gradient_scale: float,
        eps: float | None,
        betas: tuple[float, float],
        *,
        early: bool,
    ) -> Callable[[], Applied]:
        """Check and send a commit; what waits for its end. Raises: as `commit`."""
        self._check_trains(alone=True)
        if step != self.step:
            raise (DuplicateStepError if step < self.step else StepGapError)(step, self.step)
        rates = rates_by_layer(lr, self.tables)
        message = commit_message(step, rates, gradient_scale, eps, betas, early=early)
        windows = self._pending()
        missing = sorted({layer for window in windows for layer in window.missing()})
        if missing:
            raise MissingGradientError(step, missing)
        return self.commits.send(message, windows)

    def _take_back(self, step: int) -> None:
        """Close windows that were given rows of a commit which never came to be."""
        if self.staleness:  # rows that came early are those of steps before
            return
        with self._lock:
            given = [w for w in self._windows.values() if w.step == step and w.got_rows()]
        for window in given:
            window.close()

    # ------------------------------------------------------------------ snapshots and the end

    def snapshot(self) -> SnapshotRef:
        """See `session.Session.snapshot`."""
        self._check_trains(alone=True)
        request = self.connection.send(pb.SessionRequest(take_snapshot=pb.TakeSnapshot()))
        response = self.connection.result(request, "take a snapshot", works=True)
        ref = wire.decode_ref(response.snapshot_taken.snapshot)
        if ref.store_id != self.store_id:
            raise ProtocolError(
                f"the store answered with a snapshot of store {ref.store_id!r:.100}, this is "
                f"{self.store_id!r}; take it again"
            )
        return ref

    def restore(self, snapshot: SnapshotRef | int) -> None:
        """See `session.Session.restore`. Announced windows are closed."""
        self._check_trains(alone=True)
        if isinstance(snapshot, int):
            ref = pb.SnapshotRef(step=snapshot)
        else:
            ref = wire.encode_ref(snapshot)
        request = self.connection.send(pb.SessionRequest(restore=pb.Restore(snapshot=ref)))
        self.connection.result(request, f"restore {snapshot}", works=True)

    def stats(self) -> StoreStats:
        """See `session.Session.stats`: of the store, whoever used it, but for waits.

        `waits`, `wait_seconds` and `late_windows` are of this session: how long its rows took to
        come, and how often a training window's rows had not come when they were asked for.
        """
        self.connection.check()
        self.commits.settle()
        while True:
            self.connection.settle()
            stream = self.connection.current_stream()
            try:
                stats = fetch_statistics(stream.stub, self._address, self._options)
                return self.waiting.put_into(stats)
            except StoreUnreachableError:
                if not stream.ended.wait(_NOTICE_SECONDS):
                    raise

    @property
    def store_name(self) -> str:
        """What the process calls the store; empty: it was not asked for by name."""
        return self._options.store

    def administration(self) -> "Administration":
        """What `connect_admin` makes, with this session's certificates; the caller closes it.

        Raises: ConfigError: the session has channel credentials instead of certificate files.
        """
        from engram_store_client.remote.administration import Administration

        if self._credentials is not None and not isinstance(self._credentials, ClientTls):
            raise ConfigError("channel credentials are of one session only; use connect_admin")
        return Administration(self._address, tls=self._credentials)

    def close(self) -> None:
        """Leave the store, which stays open for others, after a commit that is under way.

        Closing twice is fine.
        """
        if not self.connection.forked:
            self.commits.stop()
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
