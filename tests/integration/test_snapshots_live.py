"""Exports beside a real trainer, exports that are killed, and whose checkpoints go with them."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store import snapshots
from engram_store.errors import SnapshotMismatchError
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import verify_store
from engram_store.recipes import Recipe, engram
from engram_store.testing import MemorySession
from engram_store_client import attach
from tests.crash.actions import Action, do
from tests.pairs import (
    INITIAL,
    MakeStore,
    assert_same_tables,
    files_of,
    make_oracle,
    memtable_directory,
    specs_of,
    tiny_overlay_bytes,
)
from tests.unit.client import tiny

HERE = Path(__file__).parent
EXPORTS = 8
KILLED = -9
SECONDS = 120.0


class Oracle:
    """The tables of the endless trainer after any step, in ascending order."""

    def __init__(self, recipe: Recipe) -> None:
        self._session = make_oracle(recipe, INITIAL)

    def at(self, step: int) -> MemorySession:
        while self._session.step < step:
            do(self._session, Action("step", self._session.step))
        assert self._session.step == step
        return self._session


@pytest.fixture
def trainer(
    make_store: MakeStore, recipe: Recipe
) -> "Iterator[tuple[Path, subprocess.Popen[str]]]":
    """A store, and a process that trains it until its input ends."""
    path = make_store()
    overlay_bytes = tiny_overlay_bytes(specs_of(recipe))
    command = [sys.executable, str(HERE / "endless_trainer.py"), str(path), str(overlay_bytes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield path, process
        process.kill()


def wait_for_newer(path: Path, steps: list[int]) -> None:
    """After the first export and in the middle: a new machine compiles kernels before it trains."""
    if len(steps) not in (1, EXPORTS // 2):
        return
    for _ in range(int(SECONDS / 0.01)):
        if max(StorePaths(path).snapshot_steps(), default=0) > steps[-1]:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"no snapshot after step {steps[-1]} in {SECONDS:g} s")


def test_exports_beside_training_are_exactly_its_snapshots(
    trainer: "tuple[Path, subprocess.Popen[str]]", tmp_path: Path, recipe: Recipe
) -> None:
    """The newest is exported while it is removed, folded and sealed; every export is whole."""
    path, process = trainer
    oracle, steps = Oracle(recipe), list[int]()
    for number in range(EXPORTS):
        wait_for_newer(path, steps)
        target = tmp_path / f"export-{number}"
        if number % 4 == 3:
            snapshots.pin(path, "newest", f"pin-{number}")
        made = snapshots.export(path, "newest", target, copy=bool(number % 2))
        steps.append(made.snapshot.step)
        assert verify_store(StorePaths(target)).ok
        with engram_store.open(target) as reader:
            assert reader.step == made.snapshot.step
            assert_same_tables(reader, oracle.at(reader.step))
        shutil.rmtree(target)
    assert process.poll() is None, "the trainer went on all the time"
    out, _ = process.communicate("")
    last = int(out)
    assert process.returncode == 0
    assert steps == sorted(steps)
    assert 0 <= steps[0] <= steps[-1] <= last
    assert steps[-1] > steps[0], "nothing was trained meanwhile"
    with engram_store.open(path, "train") as store:
        assert store.step == last
        assert_same_tables(store, oracle.at(last))
    pinned = {info.step: info.pins for info in snapshots.describe(path) if info.pins}
    assert sum(len(names) for names in pinned.values()) == EXPORTS // 4
    assert {last, *pinned} == set(engram_store.inspect(path).snapshots)
    report = snapshots.collect_garbage(path, keep=1)
    assert report.in_use == ()
    assert verify_store(StorePaths(path)).ok


@pytest.fixture
def trained(make_store: MakeStore) -> Path:
    """A closed store with a base, a fold and a segment at step 2."""
    path = make_store()
    with engram_store.open(path, "train", fold_ratio=1e9) as store:
        for step in range(2):
            do(store, Action("step", step))
            store.snapshot()
            if step == 0:
                store.fold()
    return path


@pytest.mark.parametrize("copy", [False, True])
def test_a_killed_export_leaves_nothing_under_the_targets_name(
    trained: Path, tmp_path: Path, recipe: Recipe, copy: bool
) -> None:
    """Whenever it dies; the source is untouched, and the next export clears up and succeeds."""
    target, building = tmp_path / "made", tmp_path / ".made.exporting"
    before = files_of(trained)

    def export(at: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, HERE / "killed_exporter.py", trained, "2", target, copy, at]
        return subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, text=True, check=False
        )

    whole = export(0)
    assert whole.returncode == 0
    operations = int(whole.stdout)
    shutil.rmtree(target)
    ends = set()
    for at in (1, 3, operations // 3, operations // 2, operations - 2, operations - 1, operations):
        assert export(at).returncode == KILLED
        assert files_of(trained) == before
        ends.add(target.exists())
        if target.exists():  # killed while its name was being made durable
            assert verify_store(StorePaths(target)).ok
            shutil.rmtree(target)
        shutil.rmtree(building, ignore_errors=True)  # clearing up takes operations, too
    assert ends == {False, True}
    export(operations // 2)
    assert building.exists()

    assert export(0).returncode == 0

    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    oracle = Oracle(recipe)
    with engram_store.open(target) as reader:
        assert_same_tables(reader, oracle.at(2))
    report = verify_store(StorePaths(target))
    assert report.ok
    assert not report.notes


def test_a_checkpoint_goes_with_the_store_exported_at_it(tmp_path: Path) -> None:
    """And with no other; the message names both stores, and nothing has changed."""
    recipe = engram(
        token_map=np.arange(tiny.VOCABULARY),
        layers=tiny.LAYERS,
        rows_per_head=31,
        heads=2,
        pad_id=0,
    )
    paths = {name: tmp_path / f"{name}.engram" for name in ("a", "b", "stranger")}
    for name in ("a", "stranger"):
        engram_store.create(paths[name], recipe, dim=tiny.DIM, initial=INITIAL)
    model = tiny.llama()

    def train(path: Path, load: Path | None, save: Path) -> list[bytes]:
        """Load, train a step, save; the rows before the step."""
        with engram_store.open(path, "train") as store:
            memory = attach(model, store)
            try:
                if load is not None:
                    memory.load(load)
                rows = [
                    store.read_rows(layer, np.arange(spec.rows, dtype=np.int32)).tobytes()
                    for layer, spec in store.tables.items()
                ]
                tiny.loss_of(model, tiny.make_tokens()).backward()
                memory.commit(memory.step, lr=1.0)
                memory.save_pretrained(save)
            finally:
                memory.detach()
        return rows

    first, second, own = (tmp_path / name for name in ("first", "second", "own"))
    train(paths["a"], None, first)
    at_first = train(paths["a"], first, second)
    snapshots.export(paths["a"], 1, paths["b"])

    assert train(paths["b"], first, own) == at_first
    assert train(paths["b"], first, own) == at_first, "again: its snapshot is still there"

    ids = {name: engram_store.inspect(path).metadata.store_id for name, path in paths.items()}
    for name, checkpoint, hint in (
        ("b", second, "exported from that snapshot .*an export of it from step 1"),
        ("stranger", first, "open the store that was trained with it"),
        ("a", own, "open the store that was trained with it"),
    ):
        before = engram_store.inspect(paths[name]).step
        with pytest.raises(SnapshotMismatchError, match=hint) as refused:
            train(paths[name], checkpoint, tmp_path / "none")
        assert ids[name] in str(refused.value)
        assert engram_store.inspect(paths[name]).step == before
    for name, path in paths.items():
        shutil.rmtree(memtable_directory(path, ids[name]), ignore_errors=True)
