"""Which images one moment may leave behind.

Unsynced changes are kept or lost one by one. A few give all combinations; many give those that
find bugs: none, all, each alone, all but each, each prefix, whole classes, and seeded random ones.
"""

from collections.abc import Collection, Iterator

import numpy as np

from engram_store.testing.crash.model import FileSystem, patched
from engram_store.testing.crash.nodes import Blob, Change, Image
from engram_store.testing.disk import Operation

_ALL_COMBINATIONS_OF = 4
_WORD = 8
"""Bytes of the largest store that no other thread or death can cut in two."""


def dead_process(files: FileSystem) -> Image:
    """The process died between two operations: the host keeps all that it did."""
    kept = {change.number for change in files.unsynced}
    return files.after(kept, dict(files.memory), "the process died")


def torn_operation(
    files: FileSystem, operation: Operation, rng: np.random.Generator, cuts: int
) -> Iterator[Image]:
    """The process died within an operation that is not one store: some of it was done.

    Args:
        files: before the operation.
        operation: the next one.
        rng: chooses where it is cut.
        cuts: images at most.
    """
    path = files.relative(operation.path)
    if operation.kind in ("store", "stored"):
        old = files.memory[path]
        for new, words in _torn(operation.data, _old_data(old, operation), rng, cuts):
            image = dead_process(files)
            image.memory = {**image.memory, path: patched(old, operation.offset, new)}
            image.words = f"the process died within the next operation: {words}"
            yield image
    elif operation.kind == "write" and operation.data:
        for cut in sorted({int(rng.integers(0, len(operation.data))) for _ in range(cuts)}):
            image = dead_process(files)
            if path not in image.files:
                return
            content = image.files[path].data.ljust(operation.offset + cut, b"\0")
            new = patched(content, operation.offset, operation.data[:cut])
            image.files, image.files_key = {**image.files, path: Blob(new)}, 0
            image.words = f"the process died after {cut} bytes of the next write"
            yield image


def _old_data(memory: bytes, operation: Operation) -> bytes:
    return memory[operation.offset : operation.offset + len(operation.data)]


def _torn(
    data: bytes, old: bytes, rng: np.random.Generator, cuts: int
) -> Iterator[tuple[bytes, str]]:
    """Prefixes, suffixes and arbitrary words of a store: compilers order them as they like."""
    words = -(-len(data) // _WORD)
    if words < 2 or data == old:
        return
    places = {1, words // 2, words - 1, *(int(n) for n in rng.integers(1, words, max(cuts, 1)))}
    for place in sorted(places)[:cuts]:
        cut = place * _WORD
        yield data[:cut] + old[cut:], f"its first {cut} bytes were stored"
        yield old[:cut] + data[cut:], f"all but its first {cut} bytes were stored"
    chosen = rng.random(words) < 0.5
    pieces = [(data if chosen[i] else old)[i * _WORD : (i + 1) * _WORD] for i in range(words)]
    yield b"".join(pieces), "every other word of it, by chance, was stored"


def lost_host(
    files: FileSystem, rng: np.random.Generator, subsets: int, *, memory: bool = False
) -> Iterator[Image]:
    """The host was lost: shared memory is gone, unsynced changes may be.

    Args:
        files: at the moment of the loss.
        rng: chooses random subsets.
        subsets: how many of them, where there are too many to take all.
        memory: also images in which the files of shared memory are there, because they were on
            a disk, but are of another boot.
    """
    changes = files.unsynced
    for kept, words, stale in _choices(changes, rng, subsets):
        yield files.after(kept, {}, f"the host was lost; {words}", stale=stale)
    if memory:
        for kept, words in ((set[int](), "nothing"), ({c.number for c in changes}, "everything")):
            text = f"the host was lost, but memory files lay on a disk; {words} unsynced was kept"
            image = files.after(kept, dict(files.memory), text)
            image.same_boot = False
            yield image


def _choices(
    changes: list[Change], rng: np.random.Generator, subsets: int
) -> Iterator[tuple[Collection[int], str, bool]]:
    """Numbers of the changes that are kept, in words, and whether holes are stale blocks."""
    numbers = [change.number for change in changes]
    if len(changes) <= _ALL_COMBINATIONS_OF:
        for mask in range(1 << len(changes)):
            kept = [n for i, n in enumerate(numbers) if mask >> i & 1]
            yield kept, _words(changes, kept), False
        return
    everything = set(numbers)
    yield (), "nothing unsynced was kept", False
    yield everything, "everything unsynced was kept", False
    for change in changes:
        yield {change.number}, f"of what was unsynced only {change} was kept", False
        yield everything - {change.number}, f"everything unsynced but {change} was kept", False
    for count in range(2, len(numbers) - 1):
        words = f"the first {count} of {len(numbers)} unsynced changes were kept"
        yield set(numbers[:count]), words, False
    for lost, what in (("data", "data"), ("length", "lengths"), ("name", "names")):
        kept = [change.number for change in changes if change.kind != lost]
        if len(kept) < len(numbers):
            yield kept, f"everything unsynced but {what} was kept", False
            if lost == "data":
                yield kept, "unsynced lengths and names were kept, with stale blocks", True
    for _ in range(subsets):
        share = (0.15, 0.5, 0.85)[int(rng.integers(3))]
        kept = [
            n for n, keep in zip(numbers, rng.random(len(numbers)) < share, strict=True) if keep
        ]
        stale = bool(rng.integers(2))
        yield kept, _words(changes, kept) + (", with stale blocks" if stale else ""), stale


def _words(changes: list[Change], kept: Collection[int]) -> str:
    if not changes:
        return "nothing was unsynced"
    lost = [str(change) for change in changes if change.number not in kept]
    if not lost:
        return "everything unsynced was kept"
    shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
    return f"{len(kept)} of {len(changes)} unsynced changes were kept; lost: {shown}"
