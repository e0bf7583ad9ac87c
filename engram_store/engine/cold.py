"""What a store's tables share to read cold pages: a reader, and who knows which are cold."""

import contextlib
import logging
import threading
from collections.abc import Iterable

import numpy as np

from engram_store.engine.memory import PAGE_BYTES, Mapping
from engram_store.engine.memory_plan import MemoryPlan
from engram_store.kernels.pages import RESIDENT, UNIT_BYTES
from engram_store.paging import Keeper, PageReader, Residency, choose_reader

_logger = logging.getLogger(__name__)
_WINDOWS_UNTIL_WARM = 64
_MOST_LOOKED_AT = 8 << 30
_SLICES = 2
"""Asked for at a time: the one that is copied, and the next."""
_LEAST_SLICE_ROWS = 128
_WINDOWS_IN_CACHE = 1.5
"""Windows of pages that the page cache should hold."""


class Paging:
    """How cold pages are read, and who knows which are cold.

    Args:
        reader: starts reads; None: the best that works here.
        plan: how memory is divided; None: there is enough.
    """

    def __init__(self, reader: PageReader | None = None, plan: MemoryPlan | None = None) -> None:
        self.reader = reader or choose_reader()
        self._keeper = Keeper()
        self._watched: dict[Mapping, Residency] = {}
        self._lock = threading.Lock()
        self._calm = self._remembered = _WINDOWS_UNTIL_WARM
        self._plan = plan
        self._rows = self._faults = 0
        self._warned = False

    def slice_rows(self, row_bytes: int, most: int) -> int:
        """How many rows may be asked for together, so that their pages last until they are copied.

        Args:
            row_bytes: of one row; each is taken to be on pages of its own.
            most: with enough memory.
        """
        if self._plan is None:
            return most
        pages_bytes = -(-row_bytes // PAGE_BYTES) * PAGE_BYTES
        rows = self._plan.in_flight_bytes // (_SLICES * pages_bytes)
        return min(max(rows, _LEAST_SLICE_ROWS), most)

    def watch(self, mapping: Mapping) -> int:
        """Know from now on which pages of a mapped file are in memory.

        Returns:
            The address of one byte per page, which stays until `forget`.
        """
        residency = Residency(mapping.address, mapping.bytes.size, mapping.path)
        with self._lock:
            self._watched[mapping] = residency
        self._keeper.register(residency)
        return residency.address

    def look_at(self, mappings: Iterable[Mapping]) -> None:
        """Know now which pages of watched files are in memory: 15 ms per GB.

        Of more than 8 GiB the rest is looked at in the background.
        """
        left = _MOST_LOOKED_AT
        for mapping in mappings:
            with self._lock:
                residency = self._watched.get(mapping)
            left -= mapping.bytes.size
            if residency is not None and left >= 0:
                # A file that was unmapped just now; a belief must not fail a seal or a fold.
                with contextlib.suppress(OSError):
                    residency.refresh()

    def forget(self, mapping: Mapping) -> None:
        """The mapping is about to be unmapped."""
        with self._lock:
            residency = self._watched.pop(mapping, None)
        if residency is not None:
            self._keeper.forget(residency)

    def resident_bytes(self, mapping: Mapping) -> int | None:
        """Bytes of a watched file that are believed to be in memory, in whole pages.

        Reads a byte per page, and asks nobody. None: not all of them were looked at yet, or the
        kernel does not tell.
        """
        with self._lock:
            residency = self._watched.get(mapping)
        if residency is None or not residency.known:
            return None
        return int(np.count_nonzero(residency.pages == RESIDENT)) * UNIT_BYTES

    @property
    def cold(self) -> bool:
        """Whether rows had to be read from the disk in the last windows."""
        return self._calm < _WINDOWS_UNTIL_WARM

    @property
    def forgetful(self) -> bool:
        """Whether pages that were thought to be in memory were gone in the last windows."""
        return self._remembered < _WINDOWS_UNTIL_WARM

    def saw(self, rows: int, pages: int, faults: int) -> None:
        """Rows were copied: pages that were read for them, and pages that had to be waited for.

        The latter were believed to be in memory, or were read and gone again before they were used.
        """
        with self._lock:
            self._calm = 0 if pages or faults else self._calm + 1
            self._remembered = 0 if faults else self._remembered + 1
            self._rows += rows
            self._faults += faults
        if faults:
            self._keeper.suspect()
        if self._plan is not None and not self._warned:
            self._warn(pages * PAGE_BYTES, self._plan)

    def _warn(self, window_bytes: int, plan: MemoryPlan) -> None:
        wanted = int(_WINDOWS_IN_CACHE * window_bytes)
        if wanted > plan.page_cache_bytes:
            self._warned = True
            _logger.warning(
                "a window needs %d bytes of pages from the disk, %d should be left for the page "
                "cache, and there are %d: pages will be gone before they are used. Lower "
                "overlay_bytes (now %d) or lookahead_bytes (now %d), take fewer tokens a window, "
                "or raise memory_bytes or the limit of the cgroup",
                window_bytes,
                wanted,
                plan.page_cache_bytes,
                plan.overlay_bytes,
                plan.staging_bytes,
            )

    def counted(self) -> tuple[int, int]:
        """Rows that were copied since the last call, and of them those that were waited for."""
        with self._lock:
            rows, faults, self._rows, self._faults = self._rows, self._faults, 0, 0
        return rows, faults

    def close(self) -> None:
        """End the thread; mappings are closed by their tables."""
        self._keeper.stop()
