"""How long a trainer waits for rows, measured where it waits: at its own end of the session."""

import time
from typing import Any, cast

from engram_store.session import Session, Window
from engram_store.types import Inverse, RowBlock, TokenIds
from engram_store_client.devices.host_memory import assign, host_memory_of


class RowWaits:
    """Measures one session. Windows that are only read, as in evaluation, do not count."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Spent in `Window.rows` of training windows so far."""

    def measured(self, session: Session) -> Session:
        """The session, with windows that are measured."""
        measured = _MeasuredSession(session, self)
        memory = host_memory_of(session)
        if memory is not None:
            assign(measured, memory)  # its rows are those of the session
        return cast("Session", measured)

    def add(self, seconds: float) -> None:
        """One wait."""
        self.seconds += seconds


class _MeasuredSession:
    """A session; everything but `announce` is its own."""

    def __init__(self, session: Session, waits: RowWaits) -> None:
        self._session, self._waits = session, waits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def announce(self, tokens: TokenIds, step: int | None = None, **options: Any) -> Window:
        window = self._session.announce(tokens, step, **options)
        return window if step is None else cast("Window", _MeasuredWindow(window, self._waits))


class _MeasuredWindow:
    """A window; everything but `rows` is its own."""

    def __init__(self, window: Window, waits: RowWaits) -> None:
        self._window, self._waits = window, waits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._window, name)

    def rows(self, layer: int) -> tuple[RowBlock, Inverse]:
        start = time.perf_counter()
        found = self._window.rows(layer)
        self._waits.add(time.perf_counter() - start)
        return found
