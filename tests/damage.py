"""Damaging a store's files on purpose, and what docs/format.md says that they hold."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.layout import arrays
from engram_store.layout.checksums import BLOCK_BYTES
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import VerifyReport, verify_store
from engram_store.recipes import engram
from engram_store.snapshots import pin
from engram_store.store import Store
from tests.pairs import INITIAL, random_tokens

DIMS = {1: 96, 2: 32}
ROW_BYTES = 192  # of layer 1, bfloat16
STEPS = 4


def train(store: Store, rng: np.random.Generator, shape: tuple[int, int]) -> None:
    """One step on random tokens."""
    window = store.announce(random_tokens(rng, shape), store.step)
    for layer in store.tables:
        size = window.row_ids(layer).size
        window.push(layer, rng.standard_normal((size, DIMS[layer])).astype(np.float32))
    store.commit(store.step, lr=0.1)


def make_store_with_history(path: Path) -> None:
    """Two tables of many chunks: a fold, segments before and after it, a snapshot every step."""
    recipe = engram(
        token_map=np.arange(500),
        layers=[1, 2],
        rows_per_head=1_000,
        orders=(2, 3),
        heads=4,
        pad_id=2,
    )
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "MAX_CHUNK_BYTES", 1 << 10)  # chunks of 1,024 rows
        other = {
            "dim": DIMS[2],
            "dtype": engram_store.RowDtype.FLOAT32,
            "optimizer": engram_store.OptimizerKind.ADAM,
        }
        engram_store.create(
            path, recipe, dim=DIMS[1], initial=INITIAL, per_layer={2: other}, seed=3
        )
        with engram_store.open(path, "train", fold_ratio=1e9) as store:
            for step in range(STEPS):
                # One n-gram first, so that the fold leaves chunks alone (hard links).
                train(store, rng, (1, 1) if step < 2 else (2, 80))
                store.snapshot()
                if step == 1:
                    store.fold()
                    pin(path, step + 1, "kept")


def verify(path: Path) -> VerifyReport:
    """What the command does."""
    return verify_store(StorePaths(path))


def files_of(path: Path) -> list[str]:
    """Every file but the lock, which holds no data."""
    found = (file for file in path.rglob("*") if file.is_file() and file.name != "LOCK")
    return sorted(str(file.relative_to(path)) for file in found)


def names_of(path: Path, file: str) -> set[str]:
    """The file's names: an unchanged chunk belongs to several generations."""
    inode = (path / file).stat().st_ino
    return {name for name in files_of(path) if (path / name).stat().st_ino == inode}


@contextlib.contextmanager
def changed(file: Path, change: Callable[[bytearray], Any]) -> Iterator[None]:
    """The file with other bytes, in place: hard links stay what they are."""
    before = file.read_bytes()
    data = bytearray(before)
    change(data)
    assert bytes(data) != before
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before)


def flip(position: int, bit: int = 0) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[position] ^= 1 << bit

    return change


@contextlib.contextmanager
def swapped(one: Path, other: Path) -> Iterator[None]:
    """Two files under each other's names."""
    aside = one.with_name("aside")

    def swap() -> None:
        one.rename(aside)
        other.rename(one)
        aside.rename(other)

    assert one.stat().st_size == other.stat().st_size
    assert one.read_bytes() != other.read_bytes()
    swap()
    try:
        yield
    finally:
        swap()


def rows_of_block(path: Path, file: str, block: int) -> tuple[int, list[int]]:
    """Layer and rows of a block of a data file, from docs/format.md alone."""
    pieces = file.split("/")
    layer, start = int(pieces[1]), block * BLOCK_BYTES
    end = min(start + BLOCK_BYTES, (path / file).stat().st_size)
    if pieces[2] == "segments":
        ids = np.fromfile((path / file).parent / "row_ids", "<i4")
        width = (path / file).stat().st_size // ids.size
        return layer, ids[start // width : -(-end // width)].tolist()
    metadata = json.loads((path / file).parents[2].joinpath("zarr.json").read_bytes())
    itemsize = {"uint16": 2, "float32": 4}[metadata["data_type"]]
    chunk_rows, width = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    first = int(pieces[-2]) * chunk_rows
    rows = range(first + start // (width * itemsize), first + -(-end // (width * itemsize)))
    return layer, [row for row in rows if row < metadata["shape"][0]]


def is_data(file: str) -> bool:
    return file.startswith("layers/") and (
        file.endswith("/0") or Path(file).name in ("row_ids", "rows", "state")
    )
