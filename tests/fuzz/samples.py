"""Real objects from which seeds are made: a tiny recipe, and a store with a segment."""

import shutil
import tempfile
import uuid
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np

from engram_store.layout import checksums
from engram_store.layout.create import create_store, table_specs
from engram_store.layout.disk import Disk
from engram_store.layout.manifest import (
    Manifest,
    Mark,
    SegmentRef,
    TableFiles,
    read_manifest,
    write_current,
)
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.segments import write_segment
from engram_store.recipes import Recipe, engram, qwen_ple
from engram_store.types import OptimizerKind, RowDtype, TableSpec

LAYER = 1
SLOTS = 40


@cache
def recipe() -> Recipe:
    """Two layers of a few dozen rows."""
    return engram(
        token_map=np.arange(30), layers=[LAYER, 3], rows_per_head=11, heads=2, orders=(2,), pad_id=0
    )


@cache
def plain_recipe() -> Recipe:
    """A recipe without a token map."""
    return qwen_ple(vocabulary=50, layers=[2], rows_per_head=7, eos_id=1, heads=2)


@cache
def metadata() -> StoreMetadata:
    """Two small tables: row-wise Adagrad, and SGD without state."""
    specs = table_specs(
        recipe(),
        dim=4,
        overrides={3: {"optimizer": OptimizerKind.SGD, "dtype": RowDtype.FLOAT32}},
    )
    tables = {spec.layer: spec for spec in specs}
    return StoreMetadata(store_id="0123456789abcdef" * 2, recipe=recipe(), tables=tables)


def spec() -> TableSpec:
    """The table of `LAYER`."""
    return metadata().tables[LAYER]


@cache
def manifest() -> Manifest:
    """A manifest with everything that a manifest can have."""
    segments = (SegmentRef(number=1, slots=SLOTS, digest="ab" * 32),)
    return Manifest(
        store_id=metadata().store_id,
        lineage=2,
        step=7,
        sealed=1,
        tables=(
            TableFiles(layer=LAYER, generation=1, base_digest="cd" * 32, segments=segments),
            TableFiles(layer=3, generation=2, base_digest="ef" * 32),
        ),
        marks=(Mark(session="89" * 16, epoch=3, step=6),),
        closed=False,
        memtables="/dev/shm/engram-store-1000",  # noqa: S108 - as in a manifest
    )


class StoreFiles:
    """A store on disk, below a new directory; its working manifest names a segment."""

    def __init__(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="store-"))
        shutil.rmtree(directory)
        # Always the same id, so that inputs that were kept fit the store of every run.
        with mock.patch("uuid.uuid4", return_value=uuid.UUID(metadata().store_id)):
            self.metadata = create_store(directory, recipe(), list(metadata().tables.values()))
        self.paths = StorePaths(directory)
        self.spec = self.metadata.tables[LAYER]
        counter = Disk()
        ids = np.arange(SLOTS, dtype="<i4") % self.spec.rows
        self.segment = write_segment(
            self.paths,
            self.metadata.store_id,
            self.spec,
            number=1,
            slots=SLOTS,
            parts={
                "row_ids": [ids],
                "rows": [np.zeros((SLOTS, self.spec.dim), self.spec.dtype.storage)],
                "state": [np.ones((SLOTS, self.spec.state_width), "<f4")],
            },
            disk=counter,
        )
        created, _ = read_manifest(self.paths)
        self.base_digest = created.table(LAYER).base_digest
        segments = created.with_segments(LAYER, (self.segment,))
        write_current(self.paths, replace(segments, sealed=1), counter)

    @property
    def segment_directory(self) -> Path:
        """Files of the segment."""
        return self.paths.segment(LAYER, self.segment.number)

    @property
    def base_directory(self) -> Path:
        """Files of the base generation of `LAYER`."""
        return self.paths.base(LAYER, 1)

    def ids_identity(self) -> int:
        """Checksum seed of the segment's row ids."""
        return checksums.identity(
            self.metadata.store_id, "segment", LAYER, self.segment.number, "row_ids"
        )


@cache
def store_files() -> StoreFiles:
    """One store per process; a target that changes a file writes all of it before each use."""
    return StoreFiles()
