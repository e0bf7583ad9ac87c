"""The whole store: every file that a manifest needs, beside a process that may be training it."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from engram_store.errors import StoreNotFoundError
from engram_store.layout.create import Progress
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify.blocks import BlockReader
from engram_store.layout.verify.description import (
    Description,
    group_documents,
    is_store,
    read_description,
)
from engram_store.layout.verify.memtables import check_memtables
from engram_store.layout.verify.needed import Needed, Part, read_needed
from engram_store.layout.verify.parts import PartCheck, check_part, part_directory
from engram_store.layout.verify.report import Damage, VerifyReport

_ROUNDS = 5
"""Folds and seals that may replace files while they are checked, before we stop following them."""
_OWN_FILES = {"LOCK", "CURRENT.json.tmp"}
_OWN_DIRECTORIES = {"memtables", "run"}
"""Below the store's directory: memtables that found no shared memory; sockets."""


def verify_store(paths: StorePaths, *, progress: Progress | None = None) -> VerifyReport:
    """Check every sealed file, manifest and checksum file of a store against its checksums.

    Takes no lock and changes nothing. A process may train the store meanwhile: a file that is gone
    or different counts as damage only if the manifests need it when they are read again.

    Args:
        paths: of the store.
        progress: told (bytes checked, bytes to check) now and then.

    Returns:
        All damages; none of them raises.

    Raises:
        StoreNotFoundError: the directory is no store, not even a damaged one.
    """
    if not is_store(paths):
        raise StoreNotFoundError(
            paths.root, "no store here; name the directory that `engram-store create` made"
        )
    started = time.perf_counter()
    run = _Run(paths, progress)
    description, fixed = read_description(paths, run.reader)
    needed, damages, notes = run.check(description)
    everywhere = [replace(d, working=True, snapshots=needed.steps) for d in fixed]
    damages = [*everywhere, *needed.damages, *damages]
    notes = [*needed.notes, *notes]
    if description is None:
        notes.append("base generations and segments were not checked: zarr.json describes them")
    else:
        if needed.working is not None and not needed.working.closed:
            found, more = check_memtables(paths, description.store_id, needed.working)
            damages += found
            notes += more
        notes += _unneeded(paths, description, needed, run.done)
    return VerifyReport(
        path=str(paths.root),
        store_id=None if description is None else description.store_id,
        files=run.reader.files,
        read_bytes=run.reader.read_bytes,
        seconds=time.perf_counter() - started,
        snapshots=needed.steps,
        damages=tuple(damages),
        notes=tuple(notes),
    )


class _Run:
    """Checks parts and follows manifests that change meanwhile."""

    def __init__(self, paths: StorePaths, progress: Progress | None) -> None:
        self._paths, self._progress = paths, progress
        self._total = 0
        self.reader = BlockReader(self._report)
        self.done: dict[Part, PartCheck] = {}

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, max(done, self._total))

    def check(self, description: Description | None) -> tuple[Needed, list[Damage], list[str]]:
        """Check all parts that the manifests need; what is gone and not needed is no damage."""
        needed = read_needed(self._paths, description, self.reader)
        if self._progress is not None:
            self._total = self.reader.read_bytes + sum(_sizes(self._paths, needed))
        for _ in range(_ROUNDS):
            for part in sorted(needed.parts.keys() - self.done.keys(), key=_place):
                self.done[part] = self._check(description, part)
            before, needed = needed, self._again(description)
            same = needed.working == before.working and needed.steps == before.steps
            if same and not needed.parts.keys() - self.done.keys():
                break
            # Whoever replaced files may have been at it when we read a segment: look again.
            for part in [p for p, check in self.done.items() if p.slots and check.damages]:
                del self.done[part]
        missed = needed.parts.keys() - self.done.keys()
        notes = [f"{len(missed)} parts were replaced faster than checked"] if missed else []
        damages = [
            replace(damage, working=working, snapshots=tuple(sorted(steps)))
            for part, (working, steps) in needed.parts.items()
            if part in self.done
            for damage in self.done[part].damages
        ]
        return needed, damages, notes

    def _check(self, description: Description | None, part: Part) -> PartCheck:
        assert description is not None  # without it no part is needed
        return check_part(self._paths, description, part, self.reader)

    def _again(self, description: Description | None) -> Needed:
        return read_needed(self._paths, description, BlockReader(lambda _: None))


def _place(part: Part) -> tuple[int, bool, int]:
    """Order of reading: table after table, the base before the segments."""
    return part.layer, part.slots is not None, part.number


def _sizes(paths: StorePaths, needed: Needed) -> Iterator[int]:
    """Lengths of the files of all parts, each file once."""
    seen = set()
    for part in needed.parts:
        for _, status in _files_below(part_directory(paths, part)):
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield status.st_size


def _files_below(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files below a directory; those that vanish meanwhile are left out."""
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory) / name
            try:
                yield path, path.lstat()
            except OSError:
                continue


@dataclass(slots=True)
class _Heap:
    """Files below one directory that nothing needs."""

    files: int = 0
    size: int = 0
    example: str = ""


def _unneeded(
    paths: StorePaths, description: Description, needed: Needed, done: dict[Part, PartCheck]
) -> list[str]:
    """One note per directory of files that nothing needs."""
    if needed.damages:
        return ["files that nothing needs are not listed: a damaged manifest may need them"]
    belongs = _belongs(description, needed, done)
    heaps: dict[str, _Heap] = {}
    for path, status in _files_below(paths.root):
        name = str(path.relative_to(paths.root))
        if not belongs(name):
            heap = heaps.setdefault(_heap_of(name), _Heap(example=name))
            heap.files += 1
            heap.size += status.st_size
    notes = []
    for directory, heap in heaps.items():
        what = heap.example if heap.files == 1 else f"{directory}: {heap.files:,} files"
        notes.append(f"{what}, {heap.size:,} bytes that nothing needs")
    notes.sort()
    if notes and needed.working is not None and not needed.working.closed:
        notes.append("the store is open: what nothing needs may be being written")
    return notes


def _heap_of(name: str) -> str:
    """The segment, generation or other directory that a file is reported with."""
    pieces = name.split("/")
    depth = 4 if pieces[0] == "layers" else 1
    return "/".join(pieces[: min(depth, len(pieces) - 1)]) or "."


def _belongs(
    description: Description, needed: Needed, done: dict[Part, PartCheck]
) -> Callable[[str], bool]:
    """Whether a file, named below the store's directory, is part of the store."""
    files = {"zarr.json", "CURRENT.json", *_OWN_FILES, *group_documents(description)}
    files |= {"token_map/zarr.json", "token_map/c/0"} if description.token_map else set()
    files |= {f"snapshots/{step:09d}.json" for step in needed.steps}
    files |= {f"snapshots/pins/{name}.json" for name in needed.pins}
    directories = [f"{name}/" for name in _OWN_DIRECTORIES]
    for part in needed.parts:
        if part in done:
            files |= done[part].files
            directories += [done[part].whole] if done[part].whole else []
    prefixes = tuple(directories)
    return lambda name: name in files or name.startswith(prefixes)
