"""Planted bugs: each is one that a storage engine has had, and the crash images must find it.

A mutant is a disk that does less than it is asked, or in another order, or a patched function.
What the process that trains sees is the same with and without them.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from engram_store.engine import recovery, rewind
from engram_store.engine.catalog import Catalog
from engram_store.engine.fold import FoldedBase
from engram_store.engine.memtable import Commit, Memtable
from engram_store.engine.merge import LiveRows, Merge
from engram_store.engine.placement import shared_directory
from engram_store.engine.seal import write_segments as real_write_segments
from engram_store.layout import journal, manifest
from engram_store.layout.disk import Disk
from engram_store.layout.files import remove_file, remove_tree, write_file
from engram_store.layout.manifest import Manifest, SegmentRef, as_working
from engram_store.layout.paths import StorePaths
from engram_store.testing import RecordingDisk
from tests.crash.recordings import (
    CHUNK_ROWS,
    STORE,
    Workload,
    backwards,
    folding,
    life,
    merging,
    merging_once,
    pinning,
    returning,
    rewinding,
)

Patch = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    """One bug, and where to look for it."""

    name: str
    workload: Workload
    during: frozenset[str]
    """The calls (`Call.kind`) in which a crash shows it."""
    disk: Callable[[], RecordingDisk] = RecordingDisk
    patch: Patch = contextlib.nullcontext
    """In force while the store trains, and while images are recovered."""
    chains: int = 0
    """See `Effort.chains`."""
    says: str = ""
    """A regular expression that the first violation matches."""


# ---------------------------------------------------------------------- disks


class _Unsynced(RecordingDisk):
    """Does not sync some files."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self._names = re.compile(names)

    def sync(self, fd: int) -> None:
        if not self._names.search(str(self._file(fd)[0])):
            super().sync(fd)


class _UnsyncedNames(RecordingDisk):
    """Does not sync some directories."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self._names = re.compile(names)

    def sync_directory(self, path: Path) -> None:
        if not self._names.search(str(path)):
            super().sync_directory(path)


class _LateData(RecordingDisk):
    """Syncs what is in segments after the manifest that names them is there."""

    def __init__(self) -> None:
        super().__init__()
        self._late: list[int] = []

    def sync(self, fd: int) -> None:
        if "/segments/" in str(self._file(fd)[0]):
            self._late.append(fd)
        else:
            super().sync(fd)

    def close(self, fd: int) -> None:
        if fd not in self._late:
            super().close(fd)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        if path.name == STORE:
            late, self._late = self._late, []
            for fd in late:
                super().sync(fd)
                super().close(fd)


class _NoPadding(RecordingDisk):
    """Writes the last chunk of a folded base up to the table's last row only."""

    _LAST = re.compile(r"/layers/(\d)/base/g000[2-9]/.*/c/2/0$")
    _ROWS: ClassVar = {"1": 8, "2": 160}
    """In the last chunk, by layer."""
    _BYTES: ClassVar = {"1": 4, "2": 8}
    """Of a row; of its state as well."""

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        match = self._LAST.search(str(self._file(fd)[0]))
        if match is None:
            return super().write(fd, data, offset)
        end = self._ROWS[match[1]] * self._BYTES[match[1]]
        assert end < CHUNK_ROWS * self._BYTES[match[1]]
        if offset < end:
            super().write(fd, data[: end - offset], offset)
        return len(data)


# ---------------------------------------------------------------------- functions


@contextlib.contextmanager
def _count_first() -> Iterator[None]:
    """The record that counts slots is published before the slots are there."""
    real_wrote, real_publish = Memtable.wrote, Memtable.publish
    waiting: list[tuple[Memtable, int, int, int]] = []

    def wrote(self: Memtable, table: int, first: int, count: int) -> None:
        waiting.append((self, table, first, count))

    def publish(self: Memtable, commit: Commit) -> None:
        real_publish(self, commit)
        while waiting:
            real_wrote(*waiting.pop())

    with (
        mock.patch.object(Memtable, "wrote", wrote),
        mock.patch.object(Memtable, "publish", publish),
    ):
        yield


def _any_boot() -> contextlib.AbstractContextManager[object]:
    """Memory is trusted whatever boot it is of."""
    real = Memtable.trusted

    def trusted(self: Memtable, store_id: str, lineage: int) -> bool:
        boot = self._identity["boot_id"][0].decode()
        with mock.patch("engram_store.engine.memtable.boot_id", return_value=boot):
            return real(self, store_id, lineage)

    return mock.patch.object(Memtable, "trusted", trusted)


def _same_lineage() -> contextlib.AbstractContextManager[object]:
    """Going back begins no new lineage, so that the forgotten future is not told from now."""

    def roll_back(self: Catalog, to: Manifest, sealed: int) -> Manifest:
        with self._lock:
            return self._publish(replace(as_working(to), lineage=self.manifest.lineage))

    return mock.patch.object(Catalog, "roll_back", roll_back)


def _journal_goes_first() -> contextlib.AbstractContextManager[object]:
    """A memtable's journal is removed when its seal begins."""

    def write_segments(paths: StorePaths, store_id: str, specs: Any, *more: Any) -> Any:
        number, disk = more[1], more[3]
        for path in paths.journal_files(up_to=number):
            remove_file(path, disk)
        return real_write_segments(paths, store_id, specs, *more)

    return mock.patch("engram_store.engine.background.write_segments", write_segments)


def _base_goes_first() -> contextlib.AbstractContextManager[object]:
    """The old base generation is removed before the manifest that names the new one is there."""
    real = Catalog.replace_base

    def replace_base(self: Catalog, layer: int, folded: set[int], base: FoldedBase) -> Manifest:
        remove_tree(self.paths.base(layer, base.generation - 1), self.disk)
        return real(self, layer, folded, base)

    return mock.patch.object(Catalog, "replace_base", replace_base)


def _in_place() -> contextlib.AbstractContextManager[object]:
    """Manifests are written under their own name, without a temporary one and a rename."""

    def replace_file(path: Path, data: bytes, disk: Disk) -> None:
        write_file(path, [data], disk)
        disk.sync_directory(path.parent)

    return mock.patch.object(manifest, "replace_file", replace_file)


def _older_versions() -> contextlib.AbstractContextManager[object]:
    """A merge writes the oldest version of a row that several segments have."""
    real = Merge.write

    def write(self: Merge, live: LiveRows, disk: Disk) -> SegmentRef:
        places = np.zeros(self._table.spec.rows, np.int32)
        for segment in reversed(self.merged):
            rows = segment.files.read_ids()
            places[rows] = np.arange(rows.size, dtype=np.int32) + segment.first_slot + 1
        return real(self, LiveRows(live.rows, places[live.rows], live.touches), disk)

    return mock.patch.object(Merge, "write", write)


def _rows_of_one() -> contextlib.AbstractContextManager[object]:
    """A merge drops the rows that only one of its segments has: they are in the base again."""
    real = Merge.find_live

    def find_live(self: Merge) -> LiveRows:
        found = real(self)
        kept = found.touches > 1
        with self._table.lock:  # so that nothing reads the segments when they are gone
            self._table.remap[found.rows[~kept]] = 0
        return LiveRows(found.rows[kept], found.places[kept], found.touches[kept])

    return mock.patch.object(Merge, "find_live", find_live)


def _merged_go_first() -> contextlib.AbstractContextManager[object]:
    """Segments are removed before the manifest is there that names the merged one instead."""
    real = Catalog.replace_segments

    def replace_segments(
        self: Catalog, layer: int, merged: set[int], new: SegmentRef | None
    ) -> None:
        for number in merged:
            remove_tree(self.paths.segment(layer, number), self.disk)
        real(self, layer, merged, new)

    return mock.patch.object(Catalog, "replace_segments", replace_segments)


def _newer_goes_first() -> contextlib.AbstractContextManager[object]:
    """A rewind removes what is newer before the store is at the snapshot."""

    def write_current(paths: StorePaths, goal: Manifest, disk: Disk) -> None:
        remove_tree(shared_directory(paths, goal.store_id, Path(goal.memtables)), disk)
        for step in paths.snapshot_steps():
            if step > goal.step:
                remove_file(paths.snapshot(step), disk)
        manifest.write_current(paths, goal, disk)

    return mock.patch.object(rewind, "write_current", write_current)


# ---------------------------------------------------------------------- all of them

_SNAPSHOT, _STEP = Workload(life, "snapshot"), Workload(life, "step")
_MERGING = Workload(merging, "step")
MUTANTS = (
    Mutant(
        name="the data of segments is not synced",
        workload=_SNAPSHOT,
        during=frozenset({"snapshot"}),
        disk=lambda: _Unsynced(r"/segments/\d+/(row_ids|rows|state)$"),
        says="host was lost",
    ),
    Mutant(
        name="a rename is not followed by a sync of the directory",
        workload=_STEP,
        during=frozenset({"seal", "commit", "snapshot"}),
        disk=lambda: _UnsyncedNames(rf"/{STORE}$"),
        says="host was lost",
    ),
    Mutant(
        name="the manifest is durable before the data that it names",
        workload=_STEP,
        during=frozenset({"seal"}),
        disk=_LateData,
        says="host was lost",
    ),
    Mutant(
        name="the count is published before its slots",
        workload=_SNAPSHOT,
        during=frozenset({"commit"}),
        patch=_count_first,
        says="process died.*a mixture",
    ),
    Mutant(
        name="journal records have no checksum",
        workload=_STEP,
        during=frozenset({"commit"}),
        patch=lambda: mock.patch.object(journal, "_checksum", return_value=0),
        says="host was lost",
    ),
    Mutant(
        name="memory of another boot is trusted",
        workload=_SNAPSHOT,
        during=frozenset({"commit"}),
        patch=_any_boot,
        says="memory files lay on a disk",
    ),
    Mutant(
        name="going back begins no new lineage",
        workload=Workload(backwards, "step"),
        during=frozenset({"restore", "commit"}),
        patch=_same_lineage,
        says="host was lost",
    ),
    Mutant(
        name="a fold drops padding rows",
        workload=Workload(folding, "snapshot"),
        during=frozenset({"fold", "commit"}),
        disk=_NoPadding,
        says="TruncatedTableError",
    ),
    Mutant(
        name="a snapshot is announced before its manifest is durable",
        workload=_SNAPSHOT,
        during=frozenset({"snapshot"}),
        disk=lambda: _UnsyncedNames("/snapshots$"),
        says="host was lost",
    ),
    Mutant(
        name="the journal is removed before its segments are durable",
        workload=_STEP,
        during=frozenset({"seal"}),
        patch=_journal_goes_first,
        says="host was lost",
    ),
    Mutant(
        name="an old base is removed before the new manifest is durable",
        workload=Workload(folding, "snapshot"),
        during=frozenset({"fold", "commit"}),
        patch=_base_goes_first,
        says="base.json: is missing",
    ),
    Mutant(
        name="manifests are written in place",
        workload=_SNAPSHOT,
        during=frozenset({"commit", "seal", "snapshot"}),
        patch=_in_place,
        says="CURRENT.json",
    ),
    Mutant(
        name="a merge keeps older versions of rows",
        workload=_MERGING,
        during=frozenset({"merge", "commit"}),
        patch=_older_versions,
        says="a mixture",
    ),
    Mutant(
        name="a merge drops rows that one segment has",
        workload=_MERGING,
        during=frozenset({"merge", "commit"}),
        patch=_rows_of_one,
        says="a mixture",
    ),
    Mutant(
        name="the manifest names a merged segment whose data is not synced",
        workload=_MERGING,
        during=frozenset({"merge"}),
        disk=lambda: _Unsynced(r"/segments/\d{16,}/(row_ids|rows|state)$"),
        says="host was lost",
    ),
    Mutant(
        name="segments are removed before the manifest that names the merged one",
        workload=Workload(merging_once, "snapshot"),
        during=frozenset({"merge"}),
        patch=_merged_go_first,
        says="segment.json: is missing",
    ),
    Mutant(
        name="a rewind removes what is newer before it went back",
        workload=Workload(rewinding, "snapshot"),
        during=frozenset({"rewind"}),
        patch=_newer_goes_first,
        says="process died",
    ),
    Mutant(
        name="a pin is announced before its name is durable",
        workload=Workload(pinning, "snapshot"),
        during=frozenset({"pin", "commit"}),
        disk=lambda: _UnsyncedNames("/pins$"),
        says="host was lost.*the pins are",
    ),
    Mutant(
        name="a pin is taken away before that is durable, and its snapshot goes",
        workload=Workload(pinning, "snapshot"),
        during=frozenset({"keep"}),
        disk=lambda: _UnsyncedNames("/pins$"),
        says="host was lost",
    ),
    Mutant(
        name="recovery relies on names that a dead process did not sync",
        workload=Workload(returning, "step"),
        during=frozenset({"restore"}),
        patch=lambda: mock.patch.object(recovery, "_keep_names"),
        chains=1000,
        says="process died.*of the recovery.*host was lost",
    ),
)
