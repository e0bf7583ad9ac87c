"""Folds and merges beside training: what is due, in what order, and what becomes of failures.

One thread does one thing at a time. It never makes a commit fail: what cannot be done now is put
off, a table with damaged files is left as it is, and both can be seen in the statistics.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event

from engram_store.engine.catalog import Catalog
from engram_store.engine.extents import Segment
from engram_store.engine.fold import Fold, FoldPlan, check_room, forget_old_files
from engram_store.engine.memory import memory_headroom_bytes
from engram_store.engine.merge import LiveRows, Merge, WriteBudget, plan_merge
from engram_store.engine.pieces import Throttle
from engram_store.engine.statistics import MaintenanceCounters
from engram_store.engine.table import Table
from engram_store.errors import DiskFaultError, DiskFullError, EngramStoreError, StoreFileError
from engram_store.failpoints import failpoint
from engram_store.layout.segments import open_segment

MAX_SEGMENTS = 64
"""Segments of a table that start a merge, or else a fold, whatever it writes; twice as many make
commits wait."""
_LOOK_SECONDS = 0.02
_MERGE_BYTES = 64
"""Memory per merged slot while it is found out which rows are live: 48 measured."""
"""How often a commit that waits looks whether it still has to."""
_logger = logging.getLogger(__name__)


class Maintenance:
    """The thread that folds and merges.

    Args:
        catalog, tables: of the engine.
        fold_ratio: fold when segments reach this multiple of the base.
        bytes_per_second: read and written; None: as fast as it goes.
        reserve_bytes: of disk, left for what seals write.
    """

    def __init__(
        self,
        catalog: Catalog,
        tables: dict[int, Table],
        fold_ratio: float,
        bytes_per_second: float | None,
        reserve_bytes: int,
    ) -> None:
        self._catalog, self._tables = catalog, tables
        self._fold_ratio, self._reserve = fold_ratio, reserve_bytes
        self._throttle = Throttle(bytes_per_second)
        self._thread = ThreadPoolExecutor(1, "engram-fold")
        self._work: Future[None] | None = None
        self.budget = WriteBudget()
        self.counters = MaintenanceCounters()
        self._damaged: set[int] = set()
        """Layers of which a file is damaged beyond single blocks: left alone until a restore."""
        self._needed: dict[int, int] = {}
        """By layer: disk space without which it is not tried again."""
        self._costs: dict[int, int] = {}
        """By layer: what a merge would have written that the budget did not allow."""

    # ------------------------------------------------------------------ what is due

    def start_if_due(self) -> None:
        """Begin what is due, unless something is under way, which goes on to it by itself."""
        idle = self._work is None or self._work.done()
        if idle and any(self._due(table) for table in self._tables.values()):
            self._work = self._thread.submit(self._run)

    def _due(self, table: Table) -> bool:
        layer = table.spec.layer
        if table.damages or layer in self._damaged or not self._has_room(layer):
            return False
        return self._fold_due(table) or bool(self._merge_due(table))

    def _has_room(self, layer: int) -> bool:
        """False: what a fold or merge was put off for is still so."""
        if layer not in self._needed:
            return True
        try:
            free = shutil.disk_usage(self._catalog.paths.root).free
        except OSError:
            return False
        if free < self._needed[layer]:
            return False
        self._needed.pop(layer, None)
        return True

    def _fold_due(self, table: Table) -> bool:
        slots = [segment.ref.slots for segment in table.segments]
        if sum(slots) >= self._fold_ratio * table.spec.rows:
            return True
        return len(slots) >= MAX_SEGMENTS and plan_merge(slots) is None

    def _merge_due(self, table: Table) -> list[Segment]:
        """The segments that are to be merged now."""
        segments = list(table.segments)
        positions = plan_merge([segment.ref.slots for segment in segments])
        if positions is None:
            return []
        # Without the bytes that it took last time there is no use in looking what is live now.
        costs = self._costs.get(table.spec.layer, 0)
        if self.budget.left <= costs and len(segments) < MAX_SEGMENTS:
            return []
        return segments[positions.start : positions.stop]

    # ------------------------------------------------------------------ on the thread

    def _run(self) -> None:
        for table in self._tables.values():
            while self._due(table) and self._improve(table):
                pass

    def _improve(self, table: Table) -> bool:
        """Fold or merge a table; False: not now. Raises nothing that is expected to happen."""
        layer = table.spec.layer
        try:
            if self._fold_due(table):
                self._fold(table)
                return True
            return self._merge(table, self._merge_due(table), force=False)
        except DiskFullError as error:
            self.counters.postponed += 1
            _logger.warning("layer %d is folded later, when there is room: %s", layer, error)
        except DiskFaultError as error:
            _logger.warning("a fold or merge of layer %d will be tried again: %s", layer, error)
        except StoreFileError as error:
            self._leave_alone(layer, error)
        except (EngramStoreError, OSError) as error:
            _logger.warning("a fold or merge of layer %d will be tried again: %s", layer, error)
        return False

    def _leave_alone(self, layer: int, error: StoreFileError) -> None:
        self._damaged.add(layer)
        if not self._tables[layer].damages:  # those are told of by themselves
            self.counters.problems.append(str(error))
        _logger.error(
            "layer %d goes on without folds and merges until a sound snapshot is restored: %s",
            layer,
            error,
        )

    def fold_now(self) -> None:
        """Fold every table that has segments; returns when it is done.

        Raises:
            ChecksumError, StoreFileError: a file is damaged; it is named.
            DiskFullError: the tables are as before, in either case.
        """

        def fold_all() -> None:
            for table in self._tables.values():
                self._fold(table)

        self._thread.submit(fold_all).result()

    def merge_now(self) -> None:
        """Merge all segments of every table that has several, whatever it writes.

        Raises:
            As `fold_now`.
        """

        def merge_all() -> None:
            for table in self._tables.values():
                segments = list(table.segments)
                if len(segments) > 1:
                    self._merge(table, segments, force=True)

        self._thread.submit(merge_all).result()

    def _check_sound(self, table: Table) -> None:
        """Raises: ChecksumError: a block is known to be damaged."""
        if table.damages:
            raise table.damages[0].error()

    def _check_room(self, table: Table, what: str, needed: int) -> None:
        """Raises: DiskFullError: it would not fit; not to be tried before it does."""
        layer = table.spec.layer
        _logger.info("%s of layer %d needs %d bytes of disk", what, layer, needed)
        try:
            check_room(self._catalog.paths.root, f"{what} of layer {layer}", needed, self._reserve)
        except DiskFullError:
            self._needed[layer] = needed + self._reserve
            raise

    def _fold(self, table: Table) -> None:
        catalog, layer = self._catalog, table.spec.layer
        self._check_sound(table)
        catalog.settle()
        fold = Fold(table, catalog.disk, self._throttle)
        if not fold.segments:
            return
        plan: FoldPlan = fold.prepare()
        self._check_room(table, "a fold", plan.needed_bytes)
        folded = fold.write(plan)
        failpoint("fold.base_written")
        generation = table.generation
        # Before it is published: what follows must not fail half-way.
        opened = table.open_base(folded.generation, folded.description)
        try:
            numbers = {segment.ref.number for segment in fold.segments}
            catalog.replace_base(layer, numbers, folded)
        except BaseException:
            opened.close()
            raise
        failpoint("fold.published")
        table.fold_into_base(fold.folded, opened)
        failpoint("fold.swapped")
        self.counters.folds += 1
        forget_old_files(fold, plan, table, generation)
        catalog.collect_garbage()

    def _merge(self, table: Table, segments: list[Segment], *, force: bool) -> bool:
        """Merge segments; returns whether that was worth its bytes, and is done."""
        catalog, layer = self._catalog, table.spec.layer
        self._check_sound(table)
        catalog.settle()
        catalog.forget_unpublished()
        needed = _MERGE_BYTES * sum(segment.ref.slots for segment in segments)
        if not force and memory_headroom_bytes() < needed and len(table.segments) < MAX_SEGMENTS:
            self._costs[layer] = needed
            return False
        merge = Merge(table, segments, self._throttle)
        live = merge.find_live()
        size = merge.bytes_of(live)
        if not force and size > self.budget.left and len(table.segments) < MAX_SEGMENTS:
            self._costs[layer] = size
            return False
        self._costs.pop(layer, None)
        self._check_room(table, "a merge", size)
        merge.check()
        with catalog.writing_segment(layer, merge.number):
            self._write_merged(table, merge, live)
        self.budget.merged(size)
        self.counters.merges += 1
        catalog.collect_garbage()
        return True

    def _write_merged(self, table: Table, merge: Merge, live: LiveRows) -> None:
        catalog, layer = self._catalog, table.spec.layer
        numbers = {segment.ref.number for segment in merge.merged}
        new = ref = None
        if live.rows.size:
            ref = merge.write(live, catalog.disk)
            failpoint("merge.segment_written")
            files = open_segment(catalog.paths, table.store_id, table.spec, ref)
            new = table.open_segment(ref, files)
        try:
            catalog.replace_segments(layer, numbers, ref)
        except BaseException:
            if new is not None:
                table.close_segment(new)
            raise
        failpoint("merge.published")
        table.replace_segments(merge.merged, new, live.rows, live.places)
        failpoint("merge.swapped")

    # ------------------------------------------------------------------ beside commits

    def hold_back(self) -> None:
        """Let a commit wait while some table has far too many segments and that is being mended.

        Never for long without need: who waits lifts the limit on the speed, and what cannot be
        done now is not waited for.
        """
        waited = False
        while (work := self._work) is not None and not work.done() and self._crowded():
            if not waited:
                waited = True
                self.counters.commit_waits += 1
                _logger.warning("a commit waits for a fold: the disk is slower than training")
            before = self._segments()
            self._hurry(work, self._crowded)
            if work.done():
                if self._segments() >= before:
                    return
                self.start_if_due()

    def _segments(self) -> int:
        return sum(len(table.segments) for table in self._tables.values())

    def _crowded(self) -> bool:
        return any(len(table.segments) >= 2 * MAX_SEGMENTS for table in self._tables.values())

    def _hurry(self, work: "Future[None]", needed: Callable[[], bool]) -> None:
        """Wait, without a limit on the speed, for some work or until it is not needed."""
        self._throttle.hurry()
        try:
            while needed() and not work.done():
                wait([work], _LOOK_SECONDS)
        finally:
            self._throttle.relax()

    def drain(self) -> None:
        """Wait for what is under way or asked for; a failure is only logged."""
        # One thread, so this is done when everything before it is.
        self._hurry(self._thread.submit(lambda: None), lambda: True)
        self._work = None

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """What is under way or asked for is done, and nothing else begins meanwhile.

        Who exchanges the tables' files needs that: folds and merges read mapped memory.
        """
        reached, go_on = Event(), Event()

        def stand() -> None:
            reached.set()
            go_on.wait()

        work = self._thread.submit(stand)
        try:
            self._hurry(work, lambda: not reached.is_set())
            yield
        finally:
            go_on.set()
            wait([work])

    def start_over(self) -> None:
        """The tables were filled anew: what was damaged may be gone."""
        self._damaged.clear()
        self._needed.clear()
        self.counters.problems.clear()

    def stop(self) -> None:
        """Finish what runs and end the thread."""
        self._throttle.hurry()
        self._thread.shutdown()
