"""Checksums of sealed files, one per 64 KiB block, seeded with what the block is.

A block's seed is its position in its own file and the file's identity, so that a block written to
the wrong place is found as well as a flipped bit. Hash: XXH3, 64 bits.
"""

from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from engram_store.errors import ChecksumError
from engram_store.layout.files import check_length

BLOCK_BYTES = 1 << 16
Checksums = NDArray[np.uint64]
"""uint64 [blocks]: the checksum of each block of one file."""


def identity(*parts: object) -> int:
    """64-bit seed that says which file a block belongs to."""
    return xxhash.xxh3_64_intdigest("/".join(str(part) for part in parts).encode())


def content_checksum(data: bytes) -> int:
    """XXH3-64 of a whole small file: the list of checksums itself."""
    return xxhash.xxh3_64_intdigest(data)


def block_checksums(data: NDArray[Any], file_identity: int, first_block: int = 0) -> Checksums:
    """Checksum of every block of a file's bytes; the last block may be short.

    Args:
        data: the bytes, or a piece of them that starts at a block.
        file_identity: from `identity`.
        first_block: number of the block at which `data` starts.
    """
    view = memoryview(data).cast("B")  # type: ignore[arg-type]
    count = -(-len(view) // BLOCK_BYTES)
    sums = np.empty(count, "<u8")
    for block in range(count):
        start = block * BLOCK_BYTES
        seed = (file_identity + first_block + block) & (2**64 - 1)
        sums[block] = xxhash.xxh3_64_intdigest(view[start : start + BLOCK_BYTES], seed=seed)
    return sums


def first_damaged_block(data: NDArray[Any], file_identity: int, expected: Checksums) -> int | None:
    """Number of the first block whose checksum differs; None when all agree."""
    actual = block_checksums(data, file_identity)
    if actual.size != expected.size:
        return min(actual.size, expected.size)
    different = np.flatnonzero(actual != expected)
    return int(different[0]) if different.size else None


def read_checksums(path: Path, count: int, expected: int) -> Checksums:
    """A list of `count` checksums from its file, whose own `identity` is `expected`.

    Raises:
        StoreFileError: it is missing, has another length, or is damaged.
    """
    check_length(path, 8 * count)
    sums = np.fromfile(path, "<u8")
    if content_checksum(sums.tobytes()) != expected:
        raise ChecksumError(path, "the list of checksums is itself damaged")
    return sums
