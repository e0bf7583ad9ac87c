"""Batches between a data loader and their forward pass: announced early, for the step they fit.

Which step a batch belongs to is a guess: of accumulation, ends of epochs, evaluation and resumed
loaders a collator knows nothing. `OpenWindows.claim` compares the guess with the truth, so a wrong
one costs time and changes no result. Windows of a step are always announced in the order of their
forward passes: gradients are summed in that order, and a sum depends on its order.
"""

import heapq
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engram_store_client.ids import host_ids
from engram_store_client.windows import OpenWindows


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a loader with worker processes a batch comes from."""

    process: int
    """Its id: workers of another epoch are other processes, unless they persist."""
    worker: int
    workers: int
    count: int
    """Batches that the process made before."""


@dataclass(order=True, slots=True)
class _Batch:
    index: int
    """Of the epoch's training batches; of no meaning for others."""
    ticket: int = field(compare=False)
    ids: Any = field(compare=False)
    mask: Any = field(compare=False)
    training: bool = field(compare=False)
    place: Place | None = field(compare=False)
    step: int | None = field(compare=False, default=None)
    """The step it was announced for."""


class Arrivals:
    """Announces batches as they arrive, and learns from those that are claimed.

    Batches may arrive on any thread (pinning has one of its own); the store is only called on the
    thread that trains.

    Args:
        windows: where batches are announced.
        is_training: whether a batch that nobody said more about is going to be trained.
    """

    def __init__(self, windows: OpenWindows, is_training: Callable[[], bool]) -> None:
        self.accumulate = 1
        """Batches of one step."""
        self.in_order = True
        """Whether workers' batches are handed out in turn, or as they get ready."""
        self.inside_trainer = False
        """Whether a Trainer says which batches it trains: all others are then only read."""
        self._windows, self._is_training = windows, is_training
        self._owner = threading.get_ident()
        self._arrived = deque[_Batch]()
        self._waiting: list[_Batch] = []
        self._open: dict[int, _Batch] = {}
        self._seen: dict[int, int] = {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """The next training batch is the first of a loader, and of the step to be committed."""
        self.drop()
        self._counted = self._next = self._first = 0
        self._anchor, self._shift = self._windows.step, 0
        self._step: int | None = None
        self._passes = 0  # of that step
        self._before = dict(self._seen)  # persistent workers go on counting
        self._processes: dict[int, int] = {}

    def drop(self, *, training: bool = True) -> None:
        """Forget the batches that no forward pass has claimed, and close their windows.

        Args:
            training: False: only those that were going to be read.
        """
        gone = [t for t, batch in self._open.items() if training or not batch.training]
        self._windows.abandon(gone)
        self._open = {t: batch for t, batch in self._open.items() if t not in gone}
        if training:
            self._arrived.clear()
            self._waiting = []

    def arrive(self, ids: Any, mask: Any, *, training: bool | None, place: Place | None) -> int:
        """Take a batch.

        Args:
            ids, mask: token ids and attention mask [batch, time]; the mask may be None.
            training: None: not known.
            place: None: it was made in this process, and comes in its turn.

        Returns:
            Its ticket.

        Raises: what `Session.announce` raises, on the thread that trains.
        """
        ticket = self._windows.reserve_ticket()
        if training is None:
            training = not self.inside_trainer and self._is_training()
        self._arrived.append(_Batch(0, ticket, ids, mask, training, place))
        if threading.get_ident() == self._owner:
            self._announce_arrived()
        return ticket

    def claimed(self, ticket: int, step: int | None) -> None:
        """A forward pass is about to claim a ticket.

        Args:
            ticket: anybody's.
            step: that the pass belongs to; None: it only reads.
        """
        self._owner = threading.get_ident()
        self._announce_arrived()
        if step is not None and step != self._step:
            self._step, self._passes = step, 0
        batch = self._open.pop(ticket, None) or self._unannounced(ticket)
        if batch is None or step is None:
            return
        if batch.training:
            self._forget_before(batch.index)
            self._shift = (step - self._anchor) * self.accumulate + self._passes - batch.index
            self._next = max(self._next, batch.index + 1)
            ahead = [b for b in self._open.values() if b.training]
            if batch.step != step or any(b.step != self._step_of(b) for b in ahead):
                self._recall(ahead)
        self._passes += 1

    def end_step(self, step: int) -> None:
        """All forward passes of a step are done: what was announced for it besides was not."""
        left = [b for b in self._open.values() if b.training and b.step == step]
        if left:
            first = min(batch.index for batch in left)
            self._shift = (step + 1 - self._anchor) * self.accumulate - first
            self._recall([b for b in self._open.values() if b.training])

    def _step_of(self, batch: _Batch) -> int:
        guess = self._anchor + (batch.index + self._shift) // self.accumulate
        return max(guess, self._windows.step)

    def _announce_arrived(self) -> None:
        while self._arrived:
            batch = self._arrived.popleft()
            if batch.training:
                batch.index = self._index_of(batch.place)
                heapq.heappush(self._waiting, batch)
            else:
                self._announce(batch, None)
        while self._waiting and self._waiting[0].index <= self._next:
            batch = heapq.heappop(self._waiting)
            self._next = max(self._next, batch.index + 1)
            self._announce(batch, self._step_of(batch))

    def _announce(self, batch: _Batch, step: int | None) -> None:
        batch.step = step
        self._windows.announce_ahead(
            host_ids(batch.ids),
            step,
            attention_mask=None if batch.mask is None else host_ids(batch.mask),
            ticket=batch.ticket,
        )
        self._open[batch.ticket] = batch

    def _index_of(self, place: Place | None) -> int:
        """The how manyeth batch of the epoch it is: workers take turns, whoever is ready first."""
        if place is not None and self.in_order:
            if self._processes.setdefault(place.worker, place.process) != place.process:
                # New workers, and nobody said that an epoch began.
                self._first, self._processes = self._counted, {place.worker: place.process}
            self._seen[place.process] = place.count + 1
            turn = place.count - self._before.get(place.process, 0)
            index = self._first + turn * place.workers + place.worker
        else:
            index = self._counted
        self._counted = max(self._counted, index + 1)
        return index

    def _unannounced(self, ticket: int) -> _Batch | None:
        """Take out a batch that is needed before its turn."""
        for batch in self._waiting:
            if batch.ticket == ticket:
                self._waiting.remove(batch)
                heapq.heapify(self._waiting)
                return batch
        return None

    def _forget_before(self, index: int) -> None:
        """Batches were made and left out, as a stream does to begin in its middle."""
        gone = [t for t, b in self._open.items() if b.training and b.index < index]
        self._windows.abandon(gone)
        for ticket in gone:
            del self._open[ticket]
        self._waiting = [b for b in self._waiting if b.index >= index]
        heapq.heapify(self._waiting)

    def _recall(self, batches: list[_Batch]) -> None:
        """Close windows; they are announced again, for a better guess, with the next arrival."""
        self._windows.abandon([batch.ticket for batch in batches])
        for batch in batches:
            del self._open[batch.ticket]
            heapq.heappush(self._waiting, batch)
