"""`bench ipc`: a tiny run through real processes, and what it does when something is missing."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import engram_store
from engram_store.bench import Report, Workload, ipc, reads, run_bench
from engram_store.bench.footprint import STEPS, trainer_memory
from engram_store.bench.harness import Quantity, Target
from engram_store.bench.ipc import (
    EMBEDDED,
    IN_PLACE,
    LOOPBACK,
    MESSAGES,
    OWN,
    READS,
    READY,
    SHARED,
    STEP,
    WINDOW,
)
from engram_store.bench.process import python_command, store_process
from engram_store.bench.reads import IN_FLIGHT, loopback_rate, read_rate, windows_of
from engram_store.bench.report import print_report
from engram_store.bench.workplace import FIRST_STEP, LAYER, Workplace, open_store, open_workplace
from engram_store.cli import main
from engram_store.errors import ConfigError, EngramStoreError
from engram_store.layout.paths import StorePaths
from tests.pairs import MakeStore

TINY = Workload(rows=50_000, tokens=256, repetitions=2)
OVERLAY_BYTES = 4 << 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first test, used again by the others."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def place(directory: Path) -> Iterator[Workplace]:
    place = open_workplace(TINY, directory, lambda _: None)
    with place.store:
        yield place


@pytest.mark.slow
def test_ipc_measures_every_transport_and_leaves_the_store_as_it_was(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: JSON keys, all lines, targets, and the same store twice."""
    monkeypatch.setattr(ipc, "_READ_SECONDS", 0.1)
    monkeypatch.setenv("ENGRAM_STORE_MAX_SESSIONS", "nonsense")  # somebody else's store process
    sizes = ("--rows", str(TINY.rows), "--tokens", str(TINY.tokens), "--steps", "2")

    with pytest.raises(SystemExit) as end:
        main(["bench", "ipc", "--json", *sizes, "--dir", str(directory)])

    assert not end.value.code
    data = json.loads(capsys.readouterr().out)
    results = {result["name"]: result for result in data["results"]}
    lines = (WINDOW, READY, IN_PLACE, OWN, STEP)
    assert set(results) == {f"{t}: {line}" for t in (EMBEDDED, SHARED, MESSAGES) for line in lines}
    for name, result in results.items():
        assert 0 < result["median_ms"] <= result["p95_ms"] <= result["max_ms"]
        assert result["repetitions"] == TINY.repetitions
        transport, _, line = name.partition(": ")
        reference = set() if transport == EMBEDDED else {f"{EMBEDDED}: {line}"}
        assert set(result["ratio_to"]) == reference
    units = {quantity["name"]: quantity["unit"] for quantity in data["quantities"]}
    rates = dict.fromkeys([f"{t}: {READS}" for t in (EMBEDDED, SHARED, MESSAGES)], "GB/s")
    sizes_of = dict.fromkeys(["trainer memory", "trainer memory, table 8 times smaller"], "MB")
    assert units == {**rates, LOOPBACK: "GB/s", **sizes_of}
    assert all(quantity["median"] > 0 for quantity in data["quantities"])
    limits = [(target["what"], target["target"]) for target in data["targets"]]
    assert limits == [
        ("the process adds to a window", "<= 1 ms"),
        ("the process adds to a window announced ahead", "<= 1 ms"),
        ("the process adds to push and commit", "<= 2 ms"),
        ("a look-up, from tokens to rows in the trainer", "<= 0.05 us"),
        ("remote_throughput", ">= 1.5 GB/s"),
        ("trainer memory, difference to a table 8 times smaller", "<= 10 %"),
    ]
    assert all(target["met"] is not None for target in data["targets"])
    assert data["workload"]["cycles"] * data["workload"]["rounds_per_cycle"] == TINY.repetitions
    assert any("take turns on one store" in note for note in data["notes"])
    assert sorted(path.name for path in directory.iterdir()) == [
        "bench.engram",
        "rows.bin",
        "workload.json",
    ]


def test_a_block_leaves_the_store_at_the_snapshot_it_started_from(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and step: the next transport must find what this one found, also after seals."""
    monkeypatch.setattr(ipc, "_READ_SECONDS", 0.0)
    bench = replace(ipc._Transports.of(place), capacity=place.batches[0].rows.size)
    before = place.store.read_rows(LAYER, place.batches[0].rows)
    place.store.close()

    bench._run_embedded(0)

    assert [len(times) for times in bench.samples.values()] == [bench.rounds] * 5
    with open_store(place.store.path) as store:
        assert store.step == FIRST_STEP
        np.testing.assert_array_equal(store.read_rows(LAYER, place.batches[0].rows), before)


def test_the_text_report_shows_rates_and_targets_with_their_units(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is small keeps its digits."""
    workload = {"tokens": 1, "lookups_per_step": 1, "unique_rows_per_step": 1, "row_bytes": 1,
                "table_rows": 1}  # fmt: skip
    report = Report(
        bench="ipc",
        machine={"cpu": "c", "cores": 1, "load_average": [0.0]},
        workload=workload,
        quantities=[Quantity("messages: reads", "GB/s", np.array([1.5, 0.25, 2.0]))],
        targets=[
            Target.at_most("a look-up", 0.05, 0.0312, "us"),
            Target.at_least("remote_throughput", 1.5, 1.25, "GB/s"),
            Target.times_faster("a window", 5, 5.1),
        ],
    )

    print_report(report)

    lines = capsys.readouterr().out.splitlines()
    rates = next(line for line in lines if line.startswith("messages: reads"))
    assert rates.split() == ["messages:", "reads", "1.50", "0.25", "2.00", "GB/s"]
    assert "met     a look-up: 0.031 us (target <= 0.05 us)" in lines
    assert "missed  remote_throughput: 1.25 GB/s (target >= 1.5 GB/s)" in lines
    assert "met     a window: 5.10x (target >= 5x)" in lines


def test_what_is_missing_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made."""
    monkeypatch.setitem(sys.modules, "grpc_health", None)

    with pytest.raises(ConfigError, match=r"needs grpc_health: pip install 'engram-store\[server"):
        run_bench("ipc", TINY, tmp_path, lambda _: None)

    assert not list(tmp_path.iterdir())


def test_a_store_process_ends_with_its_block_even_after_an_error(make_store: MakeStore) -> None:
    """Nothing is left behind: no process that has the store, no socket."""
    root = make_store()
    sockets: list[Path] = []

    def fail() -> None:
        with store_process(root, OVERLAY_BYTES) as addresses:
            sockets.append(Path(addresses.unix.removeprefix("unix://")))
            assert sockets[0].exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert not sockets[0].parent.exists()
    engram_store.open(root, "train", overlay_bytes=OVERLAY_BYTES).close()  # or: StoreLockedError


def test_a_store_process_that_cannot_start_says_why(make_store: MakeStore) -> None:
    """With the last words of its log."""
    root = make_store()
    with (
        engram_store.open(root, "train", overlay_bytes=OVERLAY_BYTES),
        pytest.raises(EngramStoreError, match="is open for training by"),
        store_process(root, OVERLAY_BYTES),
    ):
        pass


def test_a_store_process_ends_when_the_benchmark_is_killed(make_store: MakeStore) -> None:
    """The kernel sees to it; otherwise the store would stay locked for ever."""
    root = make_store()
    script = (
        "import os; from pathlib import Path; from engram_store.bench.process import *\n"
        f"with store_process(Path({str(root)!r}), {OVERLAY_BYTES}): os.kill(os.getpid(), 9)"
    )

    # A socket's path is short, so not below `tmp_path`.
    with tempfile.TemporaryDirectory() as room:
        environment = {**os.environ, "TMPDIR": room}
        command = [sys.executable, "-c", script]
        killed = subprocess.run(command, timeout=60, check=False, env=environment)
        assert killed.returncode == -signal.SIGKILL
        with StorePaths(root).lock.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits until the store process has closed it

    with engram_store.open(root, "train", overlay_bytes=OVERLAY_BYTES) as store:
        assert store.recovery is not None
        assert store.recovery.kind == "clean"


def test_trainer_memory_counts_what_a_trainer_holds(make_store: MakeStore) -> None:
    """Rows and gradient of a window at least, and the steps were trained."""
    root = make_store()
    tokens = np.random.default_rng(0).integers(0, 500, (3, 4, 64))
    with store_process(root, OVERLAY_BYTES) as addresses:
        grown = trainer_memory(addresses.unix, tokens)

    assert grown > 1024
    with engram_store.open(root) as store:
        assert store.step == STEPS


def test_a_trainer_that_fails_says_why() -> None:
    """Not a number, but its error."""
    with pytest.raises(EngramStoreError, match="cannot connect to 'tcp://nowhere'"):
        trainer_memory("tcp://nowhere", np.zeros((1, 1, 1), np.int64))


def test_read_windows_have_about_the_wanted_bytes(place: Workplace) -> None:
    """Of unique rows; whole batches where those are smaller."""
    row_bytes, scratch = place.spec.row_bytes, 64 * 1024

    windows = windows_of(place.recipe, place.batches, row_bytes, scratch)
    whole = windows_of(place.recipe, place.batches, row_bytes, 1 << 40)

    assert len(windows) == 8
    with place.store.announce(windows[0]) as window:
        rows, _ = window.rows(LAYER)
        assert scratch <= rows.nbytes < scratch + 17 * row_bytes
    assert all(window.shape == (1, TINY.tokens) for window in whole)


def test_rates_are_bytes_that_arrived_over_the_time_it_took(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reader reads one window at least, however short the time."""
    windows = [batch.tokens for batch in place.batches[:8]]
    read = sum(batch.rows.size for batch in place.batches[:IN_FLIGHT]) * place.spec.row_bytes

    def two_seconds_pass_after(calls: int) -> None:
        clock = iter([0.0] * calls + [2.0])
        monkeypatch.setattr(reads, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    two_seconds_pass_after(2 + IN_FLIGHT)
    assert read_rate(place.store, windows, 0.0) == read / 2e9
    two_seconds_pass_after(3)
    assert loopback_rate(1 << 20, 0.0) == (1 << 20) / 2e9


def test_a_session_that_travels_another_way_is_not_measured() -> None:
    """Numbers of messages must not be called those of shared memory."""
    session = SimpleNamespace(transport=MESSAGES)

    with pytest.raises(EngramStoreError, match="uses messages, not shared memory"):
        ipc.check_transport(session, SHARED)

    ipc.check_transport(session, MESSAGES)


def test_a_child_of_nobody_does_not_start() -> None:
    """Its benchmark was killed before it could ask the kernel to be told."""
    command = python_command("engram_store.cli", "--version")
    command[-2] = command[-2].replace(str(os.getpid()), "1")

    result = subprocess.run(command, capture_output=True, timeout=60, check=False)

    assert (result.returncode, result.stdout) == (1, b"")
