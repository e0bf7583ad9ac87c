"""How much of the memtables is used: less while pages of segments and of the base go too early.

What memtables take the page cache does not have. Where it starves, pages that were read are gone
before they are used, and are waited for one by one. Then memtables are sealed before they are full,
and the memory of the slots that are not reached is given back.
"""

import logging
from collections import deque
from collections.abc import Sequence

from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memory import memory_headroom_bytes
from engram_store.engine.memtable import Memtable
from engram_store.errors import CapacityError, SharedMemoryFullError

_logger = logging.getLogger(__name__)
_STARVED = 0.1
"""Of the rows that a step copied, so many had to be waited for: pages do not last.

Measured with 256 MiB for a table of 1 GiB: 1-4 % where the page cache holds six windows, 5 % for
three, and a fifth up to half for one."""
_CALM = 0.02
_LEAST_FAULTS = 64
"""Fewer are no measurement."""
_RECENT, _STARVED_OF_RECENT = 8, 4
_CALM_STEPS = 64
_PARTS = 4


class RoomRule:
    """How many slots are used before a memtable is sealed. Decides only; holds no memory.

    Args:
        capacity: slots of a memtable, a multiple of 4,096.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = self.slots = capacity
        self.shrunk = self.grown = 0
        """How often `slots` became less, or more."""
        self._parts = _PARTS
        self._largest_step = 0
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self._calm = 0

    def saw(self, rows: int, faults: int, step_rows: int) -> bool:
        """A step is done.

        Args:
            rows: copied since the step before, for windows and for commits.
            faults: of them, those whose page had gone before it was used.
            step_rows: that it updated, in the table that has most of them.

        Returns:
            Whether `slots` changed.
        """
        self._largest_step = max(self._largest_step, step_rows)
        if self._largest_step > self.slots:
            self.slots = min(round_up(self._largest_step), self.capacity)
        starved = faults >= max(_LEAST_FAULTS, _STARVED * rows)
        self._recent.append(starved)
        self._calm = 0 if faults > _CALM * rows else self._calm + 1
        if sum(self._recent) >= _STARVED_OF_RECENT:
            return self._take(self._parts - 1)
        if self._calm >= _CALM_STEPS:
            return self._take(self._parts + 1)
        return False

    def _take(self, parts: int) -> bool:
        # What follows is judged by what it changes.
        self._recent.clear()
        self._calm = 0
        parts = min(max(parts, 1), _PARTS)
        wanted = max(self.capacity * parts // _PARTS, self._largest_step)
        slots = min(round_up(wanted), self.capacity)
        if slots == self.slots:
            return False
        self._parts = parts
        self.shrunk += slots < self.slots
        self.grown += slots > self.slots
        self.slots = slots
        return True


def round_up(slots: int) -> int:
    """Whole blocks."""
    return -(-slots // BLOCK_SLOTS) * BLOCK_SLOTS


class Overlay:
    """The memory of two memtables, as much of it as is used. Belongs to who holds the commit lock.

    Args:
        memtables: both, all of their memory reserved.
    """

    def __init__(self, memtables: Sequence[Memtable]) -> None:
        self._memtables = memtables
        self.rule = RoomRule(memtables[0].capacity)

    @property
    def used_bytes(self) -> int:
        """Shared memory of slots that both memtables have now."""
        return sum(memtable.backed_bytes for memtable in self._memtables)

    def limit(self, index: int) -> int:
        """Slots of a memtable that are used before it is sealed, unless one step has more."""
        return min(self.rule.slots, self._memtables[index].backed)

    def make_ready(self, index: int) -> None:
        """A memtable that holds nothing is about to be opened: have what the rule says."""
        memtable, slots = self._memtables[index], self.rule.slots
        if memtable.backed > slots:
            self._give_back(memtable, slots)
        elif memtable.backed < slots:
            try:
                self._reserve(memtable, slots)
            except CapacityError as error:
                _logger.info("a memtable stays at %d slots: %s", memtable.backed, error)

    def reserve(self, index: int, slots: int) -> None:
        """Have memory for so many slots of a memtable.

        Raises:
            SharedMemoryFullError, DiskFullError: there is none; nothing changed.
        """
        memtable = self._memtables[index]
        if memtable.backed < slots:
            self._reserve(memtable, round_up(slots))

    def step_done(self, index: int, used: int, counted: tuple[int, int], step_rows: int) -> None:
        """A step was applied: see whether the page cache needs more.

        Args:
            index: of the open memtable.
            used: slots that commits have filled there, in the table that has most.
            counted: rows that were copied since the step before, and those waited for.
            step_rows: that the step updated, in the table that has most.
        """
        rows, faults = counted
        before = self.rule.slots
        if not self.rule.saw(rows, faults, step_rows):
            return
        _logger.info(
            "memtables of %d slots are sealed after %d, before that %d: %d of %d rows had to be "
            "waited for in this step",
            self.rule.capacity,
            self.rule.slots,
            before,
            faults,
            rows,
        )
        for i, memtable in enumerate(self._memtables):
            # One that is being sealed keeps its memory until it is opened again.
            if i == index:
                self._give_back(memtable, max(self.rule.slots, round_up(used)))
            elif not memtable.number:
                self._give_back(memtable, self.rule.slots)

    def _give_back(self, memtable: Memtable, slots: int) -> None:
        try:
            memtable.give_back(slots)
        except OSError as error:
            _logger.warning("unused memory of %s is not given back: %s", memtable.path, error)

    def _reserve(self, memtable: Memtable, slots: int) -> None:
        needed = memtable.bytes_of(slots) - memtable.backed_bytes
        # Before that: under a memory cgroup shared memory kills the process instead of failing.
        headroom = memory_headroom_bytes()
        if headroom < needed:
            raise SharedMemoryFullError(needed, headroom, "the memory limit")
        memtable.reserve(slots)
