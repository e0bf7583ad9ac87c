"""The commits of a session, of which one may go on while its trainer does."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from engram_store.errors import EngramStoreError
from engram_store.session import Applied
from engram_store.types import TableSpec
from engram_store.v1 import store_pb2 as pb
from engram_store_client.remote.connection import Connection
from engram_store_client.remote.messages import applied_record
from engram_store_client.remote.pending import Pending
from engram_store_client.remote.window import RemoteWindow


class Commits:
    """One thread sends and begins commits; any may wait for the one that is under way.

    Args:
        connection: of the session.
        tables: of the store, by layer.
        take_back: called when a commit failed, with the number of the step after it, whose windows
            may have been given rows already.
    """

    def __init__(
        self,
        connection: Connection,
        tables: Mapping[int, TableSpec],
        take_back: Callable[[int], None],
    ) -> None:
        self._connection, self._tables, self._take_back = connection, tables, take_back
        self._thread: ThreadPoolExecutor | None = None
        self._last: tuple[int, Future[Applied]] | None = None
        """What was begun last."""

    # ------------------------------------------------------------------ one commit

    def send(self, order: pb.Commit, windows: Sequence[RemoteWindow]) -> Callable[[], Applied]:
        """Send a commit; what is returned waits for its end, and raises as `Session.commit`.

        Args:
            order: what is sent.
            windows: of its step.
        """
        pending = self._connection.send(pb.SessionRequest(commit=order))
        return partial(self._finish, pending, windows)

    def _finish(self, pending: Pending, windows: Sequence[RemoteWindow]) -> Applied:
        step = pending.request.commit.step
        try:
            response = self.result(pending, f"commit step {step}", windows)
        except BaseException:
            self._take_back(step + 1)
            raise
        return applied_record(response.applied, windows, self._tables)

    def result(
        self, pending: Pending, asked: str, windows: Sequence[RemoteWindow]
    ) -> pb.SessionResponse:
        """The answer to what concerns a whole step, whose gradients may be on their way still.

        The store refuses it if it refused one of them; why is in the answer to that gradient.

        Args:
            pending: the request.
            asked: what it is, for people.
            windows: of the step.
        """
        try:
            return self._connection.result(pending, asked, works=True)
        except EngramStoreError:
            for window in windows:
                window.confirm_pushes()
            raise

    # ------------------------------------------------------------------ under way

    @property
    def under_way(self) -> int | None:
        """The step that was begun and is not done; None: there is none."""
        last = self._last
        return None if last is None or last[1].done() else last[0]

    def begin(self, step: int, finish: Callable[[], Applied]) -> "Future[Applied]":
        """Wait for the end of a commit that was sent on another thread; what comes of it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "engram-commit")
        applied = self._thread.submit(finish)
        self._last = step, applied
        return applied

    def settle(self) -> None:
        """Wait for the end of what was begun; whoever began it is told what came of it."""
        if self._last is not None:
            wait([self._last[1]])
            self._last = None

    def wait_for(self, step: int | None, answer: "Future[Any] | None" = None) -> None:
        """If the step before is being committed, wait for an answer, or for the commit's end.

        Args:
            step: of a window; None: it is only read.
            answer: to wait for; None: wait for the end.

        Raises: what the commit raised, if it ended first.
        """
        last = self._last
        if last is None or last[0] + 1 != step:
            return
        either: list[Future[Any]] = [last[1], *([] if answer is None else [answer])]
        wait(either, return_when=FIRST_COMPLETED)
        if answer is None or not answer.done():
            last[1].result()

    def stop(self) -> None:
        """Wait for the end of what was begun; nothing is begun after it."""
        if self._thread is not None:
            self._thread.shutdown()
