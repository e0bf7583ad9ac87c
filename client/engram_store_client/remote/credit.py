"""What the open windows of a session cost, and which wait because they would cost too much."""

from collections import deque
from collections.abc import Callable, Set
from typing import Generic, TypeVar

from engram_store import wire
from engram_store.errors import CapacityError
from engram_store.v1 import store_pb2 as pb

_W = TypeVar("_W")


class Credit(Generic[_W]):
    """Windows are sent in the order in which they came, as far as the store's credit goes.

    Not for several threads at once.

    Args:
        granted: by the store.
        send: sends a window's announcement.
    """

    def __init__(self, granted: pb.Credits, send: Callable[[_W], None]) -> None:
        self._bytes, self._windows, self._send = granted.bytes, granted.windows, send
        self._taken: dict[int, int] = {}
        """Bytes by number of the window."""
        self._waiting: deque[tuple[int, int, _W]] = deque()

    def submit(self, number: int, cost: int, window: _W) -> None:
        """Send a window now or when there is credit.

        Raises:
            CapacityError: there can never be enough.
        """
        if cost > self._bytes:
            raise wire.credit_error(cost, 0, self._bytes)
        self._waiting.append((number, cost, window))
        self.send_waiting()

    def send_waiting(self) -> None:
        """Send those that there is credit for."""
        while self._waiting:
            number, cost, window = self._waiting[0]
            if self._refusal(cost) is not None:
                return
            self._waiting.popleft()
            self._taken[number] = cost
            self._send(window)

    def give_back(self, number: int) -> None:
        """The window is closed, sent or not; `send_waiting` makes use of it."""
        self._taken.pop(number, None)
        self._waiting = deque(entry for entry in self._waiting if entry[0] != number)

    @property
    def holders(self) -> Set[int]:
        """Numbers of the windows that take credit."""
        return self._taken.keys()

    def refusal(self, number: int) -> CapacityError | None:
        """Why a window waits; None if it does not."""
        return next((self._refusal(cost) for n, cost, _ in self._waiting if n == number), None)

    def _refusal(self, cost: int) -> CapacityError | None:
        taken = sum(self._taken.values())
        if len(self._taken) >= self._windows:
            return wire.window_limit_error(self._windows)
        if taken + cost > self._bytes:
            return wire.credit_error(cost, taken, self._bytes)
        return None
