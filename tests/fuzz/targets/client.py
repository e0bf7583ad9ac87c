"""What a trainer reads besides messages: its checkpoint, and a store's statistics."""

import json
from collections.abc import Iterator
from pathlib import Path

from engram_store.errors import EngramStoreError, ProtocolError
from tests.fuzz.mutators import SEPARATOR, mutate_bytes, mutate_json, mutate_parts, split
from tests.fuzz.target import MEBIBYTE, Target

_TENSOR = json.dumps({"1.x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()


def _check_checkpoint(data: bytes) -> None:
    """Description, tensors and content of a safetensors file, put together here."""
    from engram_store_client import checkpoint

    description, header, content = split(data, 3)
    try:
        tensors = json.loads(header)
        tensors["__metadata__"] = {"engram_config": description.decode(errors="replace")}
        header = json.dumps(tensors).encode()
    except (TypeError, ValueError, RecursionError):
        pass
    file = len(header).to_bytes(8, "little") + header + content
    Path(checkpoint.DENSE_FILE).write_bytes(file)
    found = checkpoint.read(Path())
    assert isinstance(found.step, int)
    assert isinstance(found.snapshot.store_id, str), "the snapshot's store is no text"
    assert isinstance(found.snapshot.step, int), "the snapshot's step is no number"


def _checkpoints() -> Iterator[bytes]:
    store = {"store_id": "ab" * 16, "step": 7, "digest": "cd" * 32}
    config = {
        "version": 1,
        "name": "default",
        "step": 7,
        "store": store,
        "tables": {"exported": None, "location": "/store"},
        "gates": {},
        "fingerprint": "",
        "recipe": {},
    }
    yield SEPARATOR.join((json.dumps(config).encode(), _TENSOR, bytes(8)))
    gate = {"kind": "engram", "hidden_size": 8, "row_width": 4}
    other = {**config, "gates": {"1": gate}}
    yield SEPARATOR.join((json.dumps(other).encode(), _TENSOR, bytes(8)))
    changes: tuple[dict[str, object], ...] = (
        {"step": "seven"},
        {"gates": []},
        {"store": {**store, "store_id": 5}},
        {"store": {**store, "step": 7.0}},
    )
    for change in changes:
        yield SEPARATOR.join((json.dumps({**config, **change}).encode(), b"{}", b""))
    yield SEPARATOR.join((b"[" * 5_000, b"{}", b""))


def _check_statistics(data: bytes) -> None:
    from engram_store.stats import StoreStats
    from engram_store_client.remote.statistics import decode_statistics

    assert isinstance(decode_statistics(data.decode(errors="replace")), StoreStats)


def _statistics() -> Iterator[bytes]:
    from dataclasses import asdict

    from engram_store.stats import HeadStats, OrderStats, TableStats
    from engram_store.testing import MemorySession
    from tests.fuzz.samples import metadata

    session = MemorySession(metadata().recipe, dict(metadata().tables), {})
    record = asdict(session.stats())
    yield json.dumps(record).encode()
    head = HeadStats(
        rows=5,
        lookups=9,
        unique_rows=6,
        overlay_hits=3,
        page_hits=2,
        page_misses=1,
        sampled_rows=4,
        touched_rows=2,
    )
    table = TableStats(
        lookups=9,
        unique_rows=6,
        memtable_rows=3,
        segment_rows=2,
        rows_updated=7,
        skipped_rows=0,
        resident_bytes=4096,
        mapped_bytes=8192,
        growth=((1, 1), (4, 2)),
        orders=(OrderStats(order=2, sampled_ngrams=8, heads=(head, head)),),
    )
    yield json.dumps({**record, "tables": {"1": asdict(table)}}).encode()
    yield b"[" * 5_000


TARGETS = (
    Target(
        name="checkpoint",
        check=_check_checkpoint,
        seeds=_checkpoints,
        allowed=(EngramStoreError,),
        mutate=mutate_parts(mutate_json, mutate_json, mutate_bytes),
        memory_bytes=512 * MEBIBYTE,
        needs=("torch",),
    ),
    Target(
        name="statistics",
        check=_check_statistics,
        seeds=_statistics,
        allowed=(ProtocolError,),
        mutate=mutate_json,
        needs=("grpc",),
    ),
)
