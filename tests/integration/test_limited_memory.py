"""A table four times as large as all memory: trained exactly, and nobody is killed."""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.bench.workplace import RepeatedNormal
from engram_store.engine.memory import forget_cached_pages
from engram_store.engine.placement import memtable_files
from engram_store.recipes import engram
from tests.integration.cgroups import Group, memory_group
from tests.integration.limited_trainer import LAYER, VOCABULARY
from tests.integration.serving import ENGRAM_STORE
from tests.pairs import memtable_directory

LIMIT = 256 << 20
TABLE = 4 * LIMIT
DIM = 64
SMALL_TABLE = 64 << 20
JOB = 192 << 20
"""Memory of the trainer's group."""
TRAINER_BYTES, _NOISE_BYTES = 56 << 20, 8 << 20
STEPS = 14
_INTERPRETER_BYTES = 24 << 20
"""By which a process grows besides: kernels that are loaded, stacks of threads."""
_SECONDS = 300.0


def make(path: Path, table_bytes: int) -> Path:
    """A store whose base is really on the disk, and not in memory."""
    heads = 16
    rows = table_bytes // (2 * DIM)
    recipe = engram(
        token_map=np.arange(VOCABULARY), layers=[LAYER], rows_per_head=rows // heads, pad_id=0
    )
    engram_store.create(path, recipe, dim=DIM, initial=RepeatedNormal(std=0.02))
    os.sync()
    forget(path)
    return path


def forget(path: Path) -> None:
    """Nothing of a store is in the page cache, so that the group pays for what it reads."""
    for file in path.rglob("*"):
        if file.is_file():
            forget_cached_pages(file)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of 1 GiB, never trained."""
    room = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(room).free < 3 * TABLE:
        pytest.skip(f"this needs {3 * TABLE:,} bytes of disk at {room}")
    yield make(room / "large.engram", TABLE)
    shutil.rmtree(room)


@pytest.fixture
def store(large: Path) -> Iterator[Path]:
    """A copy to train; files of rows are never written to, so they are links."""
    path = large.parent / "trained.engram"
    shutil.copytree(large, path, copy_function=os.link)
    (path / "LOCK").unlink(missing_ok=True)  # a lock is held on the file, not on its name
    yield path
    shutil.rmtree(path)


def run(order: dict[str, Any], group: Group | None = None) -> dict[str, Any]:
    """Train in a process of its own; what it says."""
    result = start(order, group)
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def start(order: dict[str, Any], group: Group | None) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [sys.executable, "-m", "tests.integration.limited_trainer"]
    if group is not None:
        order = {**order, "group": str(group.path)}
    command.append(json.dumps(order))
    return subprocess.run(
        command if group is None else group.command(*command),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        cwd=Path(__file__).parents[2],
    )


@pytest.fixture(scope="module")
def expected(large: Path) -> str:
    """Digest of all rows that a trainer sees who has all the memory of the machine."""
    path = large.parent / "unlimited.engram"
    shutil.copytree(large, path, copy_function=os.link)
    digest = run({"path": str(path), "steps": STEPS})["digest"]
    shutil.rmtree(path)
    return str(digest)


def test_a_table_four_times_the_limit_is_trained_exactly(store: Path, expected: str) -> None:
    """Within the memory that the plan states; what is read twice has been trained in between."""
    with memory_group("store", LIMIT) as group:
        forget(store)
        answer = run({"path": str(store), "steps": STEPS}, group)
        assert group.peak_bytes <= LIMIT
        assert group.reclaims > 0  # so it was short of memory

    plan = answer["plan"]
    assert answer["digest"] == expected
    assert answer["pages_read"] * 4096 > LIMIT
    assert plan["limit_bytes"] <= LIMIT - answer["before_bytes"] + (1 << 20)
    assert plan["overlay_bytes"] <= plan["limit_bytes"] // 5
    assert plan["page_cache_bytes"] >= plan["limit_bytes"] // 4
    assert answer["held_bytes"] <= answer["before_bytes"] + plan["store_bytes"] + _INTERPRETER_BYTES


def test_a_store_killed_in_little_memory_comes_back_in_it(store: Path, expected: str) -> None:
    """Recovery too keeps to the limit, and not a step is lost, of memtables that shrank."""
    # Small from the beginning, so that some were sealed before and rows are in all places.
    options = {"overlay_bytes": 9 << 20}
    order = {"path": str(store), "steps": STEPS, "options": options, "starve": True}
    with memory_group("killed", LIMIT) as group:
        forget(store)
        killed = start({**order, "kill_after": STEPS - 2}, group)
        assert killed.returncode == -9, killed.stderr
    directory = memtable_directory(store, engram_store.inspect(store).metadata.store_id)
    left = sum(512 * file.stat().st_blocks for file in memtable_files(directory))
    assert 0 < left < 0.7 * options["overlay_bytes"]
    with memory_group("again", LIMIT) as group:
        answer = run(order, group)
        assert group.peak_bytes <= LIMIT
    assert answer["digest"] == expected
    assert len(list(store.rglob("segments/*"))) > 2


@contextmanager
def serving(path: Path, group: Group) -> Iterator[str]:
    """The address of a store process in a group."""
    room = Path(tempfile.mkdtemp(prefix="engram-store-test-"))  # short, for the socket
    command = group.command(ENGRAM_STORE, "serve", path, "--socket", room / "socket")
    log = room / "log"
    try:
        with (
            log.open("w") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            try:
                assert process.stdout is not None
                assert select.select([process.stdout], [], [], _SECONDS)[0]
                assert "serving" in process.stdout.readline(), log.read_text()
                yield f"unix://{room / 'socket'}"
                assert process.poll() is None, log.read_text()
            finally:
                process.terminate()
                process.wait(_SECONDS)
        assert process.returncode == 0, log.read_text()
    finally:
        shutil.rmtree(room, ignore_errors=True)


def test_a_trainer_does_not_know_how_large_the_table_is(
    store: Path, expected: str, tmp_path: Path
) -> None:
    """The store process keeps to its limit, and the trainer to a smaller one of its own."""
    small = make(tmp_path / "small.engram", SMALL_TABLE)
    taken, held = {}, {}
    for path in (small, store):
        with memory_group("store", LIMIT) as store_group, memory_group("job", JOB) as group:
            forget(path)
            with serving(path, store_group) as address:
                answer = run({"address": address, "steps": STEPS}, group)
                held[path] = store_group.held_bytes()
            assert store_group.peak_bytes <= LIMIT
            assert group.peak_bytes <= JOB
        assert answer["maps"] == 0
        taken[path] = answer["own_bytes"] - answer["before_bytes"]
    assert answer["digest"] == expected
    assert abs(taken[store] - taken[small]) <= _NOISE_BYTES
    assert taken[store] <= TRAINER_BYTES
    # The store process is larger by the place of every row, and by nothing else.
    more_rows = (TABLE - SMALL_TABLE) // (2 * DIM)
    assert held[store] - held[small] <= 4 * more_rows + _NOISE_BYTES
