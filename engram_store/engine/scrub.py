"""The scrubber: reads every block in use again and again, slowly, before somebody needs it.

A bit that flips on the disk is found while a sound snapshot still exists, and its rows are refused
from then on. What is in the page cache is read from there; the disk's own copy is checked when the
cache has let go of it.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from engram_store.engine.pieces import SealedFile, Throttle, read_pieces
from engram_store.engine.sealed import check_base, chunk_files, report, segment_files
from engram_store.engine.statistics import MaintenanceCounters
from engram_store.engine.table import Table
from engram_store.errors import StoreFileError
from engram_store.layout.checksums import BLOCK_BYTES

_PAUSE_SECONDS = 1.0
"""Between two passes, however small the store is."""
_logger = logging.getLogger(__name__)


class Scrubber:
    """Verifies the files of some tables in the background.

    Args:
        tables: of one store.
        bytes_per_second: how fast; 0: not at all.
        counters: where it counts.
    """

    def __init__(
        self, tables: Iterable[Table], bytes_per_second: float, counters: MaintenanceCounters
    ) -> None:
        self._tables, self._counters = list(tables), counters
        self._throttle = Throttle(bytes_per_second or None)
        self._stop = threading.Event()
        self._random = random.Random()
        self._thread: threading.Thread | None = None
        if bytes_per_second:
            self._thread = threading.Thread(target=self._run, name="engram-scrub", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        if self._thread is not None:
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._throttle.hurry()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.scrub()
            except Exception:
                _logger.exception("a pass over the store's files was given up")
            self._stop.wait(_PAUSE_SECONDS)

    def scrub(self) -> None:
        """One pass over all files in use, from a random one on."""
        files = [(table, file) for table in self._tables for file in self._files(table)]
        if not files:
            return
        start = self._random.randrange(len(files))
        for table, file in files[start:] + files[:start]:
            self._check(table, file)
            if self._stop.is_set():
                return
        self._counters.scrub_passes += 1
        self._counters.scrubbed_at = time.time()

    def _files(self, table: Table) -> list[SealedFile]:
        """The files in use whose blocks can be checked; what describes them is checked here."""
        with table.lock:
            base, files, segments = table.base, chunk_files(table), list(table.segments)
        try:
            check_base(table)
        except (StoreFileError, OSError) as error:
            self._tell(table, error, lambda: table.base is base)
        for segment in segments:
            try:
                files += segment_files(table, segment).values()
            except (StoreFileError, OSError) as error:
                self._tell(table, error, partial(lambda s: s in table.segments, segment))
        return files

    def _tell(self, table: Table, error: Exception, in_use: Callable[[], bool]) -> None:
        """A description is damaged. Rows are served: nothing says that they are wrong."""
        with table.lock:
            news = in_use() and str(error) not in self._counters.problems
        if news:
            self._counters.problems.append(str(error))
            _logger.error("damaged: %s", error)

    def _check(self, table: Table, file: SealedFile) -> None:
        try:
            for piece in read_pieces(file, self._throttle):
                for damage in piece.damages:
                    report(table, damage)
                self._counters.scrubbed_blocks += -(-piece.data.size // BLOCK_BYTES)
                if self._stop.is_set():
                    return
        except OSError as error:
            # Folds and merges remove files that nobody needs any more.
            report(table, file.whole(f"cannot be read: {error.strerror or error}"))
