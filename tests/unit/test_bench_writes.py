"""`bench writes`: a tiny run through real processes, and what counts the bytes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store.bench import Report, WritesWorkload, run_bench, writes
from engram_store.bench.device import device_bytes, device_of, memory_group, process_bytes
from engram_store.bench.process import child_result
from engram_store.bench.report import print_report
from engram_store.bench.stream import Stream, open_stream
from engram_store.bench.workplace import LAYER
from engram_store.bench.writers import (
    MMAP,
    PWRITE,
    STORE,
    WriterOrder,
    Written,
    _train_by_pwrite,
    _train_mapped,
    run_writer,
    update_rows,
)
from engram_store.bench.writes import FOLDED, PLAIN
from engram_store.cli import main
from engram_store.errors import ConfigError, EngramStoreError
from engram_store.optimizers import apply_reference, rule_step
from engram_store.types import HyperParameters, TableSpec

TINY = WritesWorkload(rows=50_000, tokens=256, repetitions=6, limited_steps=2)
_LIMIT_BYTES = 1 << 30


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first test, used again by the others."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def stream(directory: Path) -> Stream:
    return open_stream(TINY, directory, lambda _: None)


def check_memory_group() -> None:
    """Skip where no memory cgroup can be made."""
    try:
        with memory_group(_LIMIT_BYTES):
            pass
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")


@pytest.mark.slow
def test_writes_counts_bytes_of_every_writer(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line, with real limits: JSON keys, all lines, targets."""
    check_memory_group()
    sizes = ("--rows", "50000", "--tokens", "256", "--steps", "6", "--limited-steps", "2")

    with pytest.raises(SystemExit) as end:
        main(["bench", "writes", "--json", *sizes, "--dir", str(directory)])

    assert not end.value.code
    data = json.loads(capsys.readouterr().out)
    assert data["bench"] == "writes"
    steps = {result["name"]: result["repetitions"] for result in data["results"]}
    names = (PLAIN, FOLDED, STORE, MMAP, PWRITE)
    assert steps == {f"{name}: step": 6 if name in (PLAIN, FOLDED) else 2 for name in names}
    values = {quantity["name"]: quantity for quantity in data["quantities"]}
    for name in names:
        assert values[f"{name}: row bytes updated"]["unit"] == "GB"
        assert values[f"{name}: written, says the process"]["unit"] == "x"
        assert (f"{name}: written, says the store" in values) == (name in (PLAIN, FOLDED, STORE))
    updated = {name: values[f"{name}: row bytes updated"]["median"] for name in names}
    assert updated[PLAIN] == updated[FOLDED] > updated[STORE]
    assert updated[STORE] == updated[MMAP] == updated[PWRITE]
    assert [(target["what"], target["target"]) for target in data["targets"]] == [
        ("bytes written, of row bytes updated", "<= 1.1 x"),
        ("bytes written with folds, of row bytes updated", "<= 2.2 x"),
        ("in place, mmap writes more, memory a third of the table", ">= 10 x"),
        ("in place, pwrite writes more, memory a third of the table", ">= 10 x"),
    ]
    assert [target["met"] is None for target in data["targets"]] == [False, True, True, True]
    assert any("take more --rows" in note for note in data["notes"])
    assert not list(directory.glob("in-place-*"))


@pytest.mark.slow
def test_without_cgroups_the_reason_is_told(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store is measured all the same, and no flat file is made for nothing."""

    def refuse(_: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writes, "memory_group", refuse)

    report = run_bench("writes", TINY, directory, lambda _: None)
    print_report(report)

    assert [timing.name for timing in report.timings] == [f"{PLAIN}: step", f"{FOLDED}: step"]
    assert [target.measured is None for target in report.targets] == [False, True, True, True]
    out = " ".join(capsys.readouterr().out.split())
    assert "no memory cgroup here ([Errno 13] Permission denied)" in out
    assert "not measured in place, mmap writes more" in out


def made_up(
    stream: Stream, process: float, device: float | None, folds: int = 0, store: int | None = 1
) -> Written:
    """So many times the row bytes that were updated."""
    updated = 1000 * (4 + stream.spec.state_bytes + stream.spec.row_bytes)
    return Written(
        process_bytes=round(process * updated),
        store_bytes=store,
        rows_updated=1000,
        step_ms=[1.0],
        folds=folds,
        device_bytes=None if device is None else round(device * updated),
    )


def test_targets_are_judged_by_the_device_where_it_is_visible(stream: Stream) -> None:
    """And by the process otherwise; folds only when there were any."""
    report = Report(bench="writes", machine={}, workload={"limit_bytes": stream.table_bytes // 3})
    found = {PLAIN: made_up(stream, 0.5, None), FOLDED: made_up(stream, 0.5, 2.5, folds=1)}
    limited = {
        STORE: made_up(stream, 0.5, 1.0),
        MMAP: made_up(stream, 20, 30, store=None),
        PWRITE: made_up(stream, 40, 9, store=None),
    }

    writes._judge(report, stream, found, limited)

    assert [target.measured for target in report.targets] == [0.5, 2.5, 30, 9]
    assert [target.met for target in report.targets] == [True, False, True, False]
    notes = writes._notes(report, stream, found, limited)
    disturbed = [note for note in notes if "somebody else used it" in note]
    assert [note.split(" times")[0] for note in disturbed] == [
        "'with folds': the device wrote 5.0",
        "'store': the device wrote 2.0",
    ]
    assert not any("so small a table" in note for note in notes)


def test_a_store_that_was_measured_goes_back_to_its_beginning(stream: Stream) -> None:
    """The next writer finds what this one found; rows count once per step."""
    rows = np.arange(2000, dtype=np.int32)
    root = stream.order.path(stream.order.store)
    with engram_store.open(root) as store:
        before = store.read_rows(LAYER, rows)

    written = stream.run(replace(stream.order, steps=TINY.limited_steps))

    assert written.rows_updated == sum(batch.rows.size for batch in stream.batches)
    assert len(written.step_ms) == TINY.limited_steps
    assert written.store_bytes is not None
    assert written.store_bytes > 0
    assert (written.seals, written.folds) == (1, 0)
    with engram_store.open(root) as store:
        assert store.step == 0
        np.testing.assert_array_equal(store.read_rows(LAYER, rows), before)


def test_a_fold_is_counted(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that only ends when the store is closed: it is told by the base's generation."""
    order = replace(stream.order, steps=1, folds=True)
    at_once = engram_store.open
    monkeypatch.setattr(
        engram_store, "open", lambda *a, **k: at_once(*a, **{**k, "fold_ratio": 0.001})
    )

    from engram_store.bench import writers

    answer = writers._train_store(order)
    monkeypatch.undo()

    assert answer["folds"] == 1
    assert answer["store_bytes"] > stream.table_bytes
    with engram_store.open(order.path(order.store), "train") as store:
        store.restore(0)


def test_both_references_leave_the_same_table(stream: Stream) -> None:
    """Rows of a step, and no others, are updated, whichever way they are written."""
    order = replace(stream.order, steps=TINY.limited_steps)
    stream.make_flat_files()
    try:
        files = [order.path(name) for name in (order.rows_file, order.sums_file)]
        start = [path.read_bytes() for path in files]
        mapped = _train_mapped(order)
        by_mapping = [path.read_bytes() for path in files]
        for path, content in zip(files, start, strict=True):
            path.write_bytes(content)
        written = _train_by_pwrite(order)
        by_pwrite = [path.read_bytes() for path in files]
    finally:
        stream.remove_flat_files()

    assert by_mapping == by_pwrite
    count = sum(batch.rows.size for batch in stream.batches)
    assert mapped["rows_updated"] == written["rows_updated"] == count
    sums = np.frombuffer(by_pwrite[1], np.float32)
    touched = np.unique(np.concatenate([batch.rows for batch in stream.batches]))
    np.testing.assert_array_equal(np.flatnonzero(sums), touched)
    first, last = (np.frombuffer(x[0], np.uint16).reshape(-1, 64) for x in (start, by_pwrite))
    np.testing.assert_array_equal(np.flatnonzero((first != last).any(axis=1)), touched)


def test_the_references_compute_the_stores_rule() -> None:
    """Row-wise Adagrad, rounded to nearest: bit for bit where sums are exact."""
    random = np.random.default_rng(0)
    spec = TableSpec(layer=1, rows=100, dim=64, stochastic_rounding=False)
    old = (random.standard_normal((10, 64), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    state = random.integers(0, 5, (10, 1)).astype(np.float32)
    gradients = random.integers(-4, 5, (10, 64)).astype(np.float32)
    step = rule_step(spec, 0, HyperParameters(lr=0.01, eps=1e-8))
    rows = np.arange(10, dtype=np.int32)

    new, sums = update_rows(old, state[:, 0], gradients)

    wanted, wanted_state = apply_reference(spec, step, rows, old, state, gradients)
    np.testing.assert_array_equal(sums, wanted_state[:, 0])
    np.testing.assert_array_equal(new, wanted)


def test_a_limited_process_has_no_more_memory_and_the_group_goes(stream: Stream) -> None:
    """What it uses counts in the group while it runs."""
    check_memory_group()
    with memory_group(_LIMIT_BYTES) as group:
        order = replace(stream.order, steps=1, group=str(group))
        written = run_writer(order)
        limit = (group / "memory.limit_in_bytes", group / "memory.max")
        assert [int(path.read_text()) for path in limit if path.exists()] == [_LIMIT_BYTES]
        most = (group / "memory.max_usage_in_bytes", group / "memory.peak")
        assert all(int(path.read_text()) > 10 << 20 for path in most if path.exists())

    assert written.rows_updated == stream.batches[0].rows.size
    assert not group.exists()
    with engram_store.open(order.path(order.store), "train") as store:
        store.restore(0)


def test_a_writer_that_fails_says_why(tmp_path: Path) -> None:
    """Not a number, but its error."""
    order = WriterOrder(writer=STORE, layer=LAYER, dim=64, room=str(tmp_path), steps=1)

    with pytest.raises(EngramStoreError, match=r"(?s)writers ended with exit code 1.*tokens\.npy"):
        run_writer(order)


def test_a_process_that_takes_too_long_is_ended() -> None:
    """With what to try."""
    with pytest.raises(EngramStoreError, match=r"did not end in 0\.01 s.*smaller sizes"):
        child_result("engram_store.bench.writers", {}, 0.01)


def test_bytes_of_a_device_come_from_its_counters(tmp_path: Path) -> None:
    """The seventh number is sectors of 512 bytes."""
    counters = tmp_path / "stat"
    counters.write_text("  1754503 34063 63066858 876441 6418179 829015 2000 2091075 0 1 2\n")

    assert device_bytes(counters) == 1_024_000


def test_a_file_system_without_a_device_has_no_counters() -> None:
    """Shared memory."""
    assert device_of(Path("/dev/shm")) is None  # noqa: S108


def test_a_process_counts_what_it_writes(tmp_path: Path) -> None:
    """And not what is deleted before it reaches the disk."""
    if device_of(tmp_path) is None:
        pytest.skip("the temporary directory is not on a block device")
    before = process_bytes()
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fdatasync(file.fileno())

    assert process_bytes() - before >= 1 << 20


def test_more_limited_steps_than_steps_are_refused(tmp_path: Path) -> None:
    """Before anything is made."""
    workload = replace(TINY, limited_steps=7)

    with pytest.raises(ConfigError, match="limited steps are 7; they are the first of the 6 steps"):
        run_bench("writes", workload, tmp_path, lambda _: None)

    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is full."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("engram_store.bench.stream.shutil.disk_usage", lambda _: usage)

    with pytest.raises(ConfigError, match=r"needs about 38,400,000 bytes .* which has 1,000; give"):
        run_bench("writes", TINY, tmp_path, lambda _: None)

    assert not list(tmp_path.iterdir())
