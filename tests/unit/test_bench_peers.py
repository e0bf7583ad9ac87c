"""Peers of the benchmarks: they hold the same rows, train by their rule, and are never hidden."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from engram_store.bench import ComparedWorkload, Report, run_bench
from engram_store.bench.machine import describe_machine
from engram_store.bench.peers import PEERS, Peer, PeerTable, Traits
from engram_store.bench.peers.compare import Comparison, DisagreementError
from engram_store.bench.peers.fbgemm_tables import FbgemmTables
from engram_store.bench.peers.numpy_mapped import NumpyMapped
from engram_store.bench.peers.protocol import TrainingPeer, as_bits, as_floats, missing
from engram_store.bench.peers.torch_embedding import TorchEmbedding
from engram_store.bench.report import print_report
from engram_store.bench.workplace import Workplace, open_workplace

TINY = ComparedWorkload(rows=50_000, tokens=256, repetitions=2)
ROWS, DIM = 10_000, 64


@pytest.fixture
def table(tmp_path: Path) -> PeerTable:
    """Random rows whose low bits are not zero, so that every bit of them is compared."""
    bits = np.random.default_rng(0).integers(0x3C00, 0x4000, (ROWS, DIM), np.uint16)
    bits.tofile(tmp_path / "rows.bin")
    return PeerTable(
        rows_file=tmp_path / "rows.bin",
        rows=ROWS,
        dim=DIM,
        directory=tmp_path / "peers",
        training=True,
    )


def some_rows() -> NDArray[np.int64]:
    """Distinct, the first and the last among them, in no order."""
    inner = np.random.default_rng(1).choice(np.arange(1, ROWS - 1), 500, replace=False)
    return np.concatenate([inner[:250], [ROWS - 1, 0], inner[250:]]).astype(np.int64)


def opened(make: Callable[[], Peer], table: PeerTable) -> Peer:
    """A peer with its table; the test is skipped where its library is not installed."""
    peer = make()
    if reason := missing(peer.traits):
        pytest.skip(f"{peer.traits.name}: {reason}")
    assert peer.open(table) == ROWS
    return peer


@pytest.mark.parametrize("make", PEERS)
def test_a_peer_gives_the_rows_it_was_given(make: Callable[[], Peer], table: PeerTable) -> None:
    """In the order of the request, every bit; also when it finds its table again."""
    rows = some_rows()
    expected = table.flat()[rows]
    for _ in range(2):
        peer = opened(make, table)
        found = as_bits(peer.read(rows)).copy()
        peer.close()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("make", [NumpyMapped, TorchEmbedding, FbgemmTables])
def test_peers_that_are_asked_for_repeats_give_them(
    make: Callable[[], Peer], table: PeerTable
) -> None:
    """Once per position."""
    peer = opened(make, table)
    rows = np.array([7, 2, 7], np.int64)

    found = as_bits(peer.read(rows))

    np.testing.assert_array_equal(found, table.flat()[rows])
    peer.close()


@pytest.mark.parametrize("make", PEERS)
def test_names_are_different_and_limits_make_sense(make: Callable[[], Peer]) -> None:
    """Lines of a report are found by their name."""
    traits = make().traits
    assert [peer().traits.name for peer in PEERS].count(traits.name) == 1
    for limit in (traits.most_rows, traits.most_batch_rows, traits.most_rounds):
        assert limit is None or limit > 0


def trained(peer: Peer, rows: NDArray[np.int64], gradients: NDArray[np.float32]) -> Any:
    """All rows before and after one step."""
    assert isinstance(peer, TrainingPeer)
    everything = np.arange(ROWS, dtype=np.int64)
    before = peer.read(everything).copy()
    peer.train(rows, gradients)
    after = peer.read(everything).copy()
    untouched = np.setdiff1d(everything, rows)
    np.testing.assert_array_equal(after[untouched], before[untouched])
    return before[rows], after[rows]


def test_a_step_of_sparse_adam_moves_each_value_by_the_rate(table: PeerTable) -> None:
    """The first step of Adam: rate times the sign of the gradient; other rows stay."""
    peer = opened(TorchEmbedding, table)
    rows = some_rows()
    gradients = np.random.default_rng(2).choice([-1, 1], (rows.size, DIM)).astype(np.float32)

    before, after = trained(peer, rows, gradients)

    np.testing.assert_allclose(before - after, 0.01 * gradients, rtol=2e-4)
    peer.close()


def test_a_step_of_fbgemm_is_row_wise_adagrad(table: PeerTable) -> None:
    """The store's own rule: one sum of squares per row."""
    peer = opened(FbgemmTables, table)
    rows = some_rows()
    gradients = np.random.default_rng(2).standard_normal((rows.size, DIM), np.float32)

    before, after = trained(peer, rows, gradients)

    rate = 0.01 / np.sqrt(np.square(gradients).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(before - after, rate * gradients, rtol=1e-3, atol=1e-6)
    peer.close()


def test_files_of_a_peer_are_made_again_when_the_table_changes(table: PeerTable) -> None:
    """And only then; a making that failed is not mistaken for a table."""
    made: list[int] = []

    def make(place: Path) -> None:
        assert not list(place.iterdir())
        made.append(len(made))
        (place / "file").write_bytes(b"rows")
        if len(made) == 2:
            raise OSError("disk full")

    assert (table.kept("x", 5, make) / "file").exists()
    table.kept("x", 5, make)
    assert len(made) == 1
    with pytest.raises(OSError, match="disk full"):
        table.kept("x", 6, make)
    table.kept("x", 6, make)
    assert len(made) == 3
    table.rows_file.write_bytes(b"")
    table.kept("x", 6, make)
    assert len(made) == 4


def test_a_peer_gets_no_more_rows_than_memory_holds(
    table: PeerTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what is free; never none."""
    for free, rows in ((8000, 40), (10, 1), (1 << 40, ROWS)):
        monkeypatch.setattr(
            "engram_store.bench.peers.table.memory_headroom_bytes", lambda free=free: free
        )
        assert table.fitting_rows(100) == rows


def test_bits_and_floats_are_inverse_and_other_dtypes_refused() -> None:
    """Whatever a library makes of bfloat16."""
    bits = np.arange(0x4000, 0x4100, dtype=np.uint16).reshape(4, -1)

    np.testing.assert_array_equal(as_bits(as_floats(bits)), bits)
    np.testing.assert_array_equal(as_bits(bits), bits)
    with pytest.raises(TypeError, match="rows are float64"):
        as_bits(bits.astype(np.float64))


def test_a_library_that_is_not_there_or_does_not_load_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to install; and why it does not load, without paths of this machine."""
    (tmp_path / "broken_library.py").write_text("raise OSError('cannot load /secret/x.so')")
    monkeypatch.syspath_prepend(tmp_path)
    traits = Traits(name="x", what="x", module="no_such_library", distribution="numpy")

    absent = missing(traits)
    broken = missing(replace(traits, module="broken_library"))

    assert absent == "not installed; install it with `pip install 'engram-store[bench]'`"
    assert broken is not None
    assert broken.startswith(f"numpy {np.__version__} cannot be loaded (OSError: cannot load x.so)")
    sys.modules.pop("broken_library", None)


def test_what_a_library_itself_lacks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is installed, so installing it again would not help."""
    (tmp_path / "lacking_library.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    traits = Traits(name="x", what="x", module="lacking_library", distribution="numpy")

    reason = missing(traits)

    assert reason is not None
    assert "cannot be loaded (ModuleNotFoundError: No module named 'no_such_library')" in reason


# ------------------------------------------------------------------ in a report


class FakePeer(NumpyMapped):
    """numpy under another name, which can be told to go wrong."""

    traits = replace(
        NumpyMapped.traits, name="fake", every_lookup=False, most_batch_rows=100, most_rounds=1
    )
    wrong: ClassVar[bool] = False
    fails: ClassVar[bool] = False
    closed: ClassVar[int] = 0

    def open(self, table: PeerTable) -> int:
        if type(self).fails:
            raise RuntimeError("no room")
        return super().open(table) // 2

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        found = super().read(rows)
        if type(self).wrong:
            found[0, 0] ^= 1
        return found

    def close(self) -> None:
        type(self).closed += 1
        super().close()


class AbsentPeer(FakePeer):
    """Nobody has it."""

    traits = replace(FakePeer.traits, name="absent", module="no_such_library")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first test, used again by the others."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def place(directory: Path) -> Iterator[Workplace]:
    place = open_workplace(TINY, directory, lambda _: None)
    with place.store:
        yield place


def compare(place: Workplace, *peers: Callable[[], Peer]) -> Report:
    report = Report(bench="window", machine=describe_machine(), workload=place.describe())
    comparison = Comparison(place, report, lambda _: None, peers)
    comparison.reads(lambda _: 2.0, lambda _: 3.0)
    return report


def test_a_peer_with_fewer_rows_is_compared_row_by_row(place: Workplace) -> None:
    """It was asked for what it holds; the ratio is that of one row's cost."""
    report = compare(place, FakePeer, NumpyMapped)

    ours, theirs = report.timing("rows"), report.timing("fake: rows")
    assert ours is not None
    assert theirs is not None
    assert ours.rows == place.unique_rows()
    assert theirs.rows == 100
    assert ours.samples_ms.tolist() == [2.0] * (1 + TINY.repetitions)
    assert ours.ns_per_row == pytest.approx(2e6 / place.unique_rows())
    assert ours.ns_per_row is not None
    assert theirs.ns_per_row is not None
    ratio = report.ratios(ours)["fake: rows"]
    assert ratio == pytest.approx(ours.ns_per_row / theirs.ns_per_row)
    assert report.references["rows"] == ("fake: rows", "numpy memmap: rows")
    assert report.references["look-ups"] == ("numpy memmap: look-ups",)
    fake = report.peers[0]
    assert (fake.table_rows, fake.rows_per_batch) == (place.spec.rows // 2, 100)
    result = next(r for r in report.to_json()["results"] if r["name"] == "fake: rows")
    assert result["rows"] == 100


def test_a_peer_that_reads_other_rows_ends_the_benchmark(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong bit is enough, before anything is timed; its files are closed."""
    monkeypatch.setattr(FakePeer, "wrong", True)
    monkeypatch.setattr(FakePeer, "closed", 0)

    with pytest.raises(DisagreementError, match="fake reads other rows than the store"):
        compare(place, FakePeer)

    assert FakePeer.closed == 1


def test_a_peer_without_rows_to_check_is_not_believed(place: Workplace) -> None:
    """A comparison of nothing would always succeed."""
    report = Report(bench="window", machine={}, workload={})
    comparison = Comparison(place, report, lambda _: None, (FakePeer,))
    nothing = replace(comparison.sample, rows=np.empty(0, np.int32))

    with pytest.raises(DisagreementError, match="none of its rows"):
        nothing.check(NumpyMapped(), np.array([1]))


def test_peers_that_fail_or_are_absent_are_told_and_the_others_measured(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the record and on the screen."""
    monkeypatch.setattr(FakePeer, "fails", True)
    monkeypatch.setattr(FakePeer, "closed", 0)

    report = compare(place, FakePeer, AbsentPeer, NumpyMapped)

    reasons = {peer.name: peer.missing for peer in report.peers}
    assert reasons["fake"] == "failed: RuntimeError: no room"
    assert reasons["absent"] is not None
    assert reasons["absent"].startswith("not installed")
    assert reasons["numpy memmap"] is None
    assert FakePeer.closed == 1
    assert report.timing("numpy memmap: rows") is not None
    assert report.timing("fake: rows") is None
    print_report(report)
    out = " ".join(capsys.readouterr().out.split())
    assert "fake: failed: RuntimeError: no room" in out
    assert "absent: not installed; install it with `pip install 'engram-store[bench]'`" in out


def test_only_peers_that_can_train_take_part_in_steps(place: Workplace) -> None:
    """The others are not called missing there."""
    report = Report(bench="update", machine={}, workload={})
    comparison = Comparison(place, report, lambda _: None, (NumpyMapped, TorchEmbedding))
    most = max(batch.rows.size for batch in place.batches)

    comparison.steps(lambda _: 1.0, np.ones((most, place.spec.dim), np.float32))

    assert [peer.name for peer in report.peers] == ["nn.Embedding"]
    if report.peers[0].missing is None:
        assert report.timing("nn.Embedding: step") is not None
        assert set(report.references) == {"step"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "line"), [("window", "numpy memmap: rows"), ("update", "nn.Embedding: step")]
)
def test_every_peer_is_in_the_record_of_a_benchmark(directory: Path, which: str, line: str) -> None:
    """Measured, or with the reason why not; a second run finds their files."""
    report = run_bench(which, TINY, directory, lambda _: None)

    data = json.loads(json.dumps(report.to_json()))
    names = {result["name"] for result in data["results"]}
    expected = [make() for make in PEERS]
    if which == "update":
        expected = [peer for peer in expected if isinstance(peer, TrainingPeer)]
    assert [peer["name"] for peer in data["peers"]] == [peer.traits.name for peer in expected]
    for peer in data["peers"]:
        assert any(name.startswith(peer["name"]) for name in names) == (peer["missing"] is None)
        assert peer["missing"] is None or "install" in peer["missing"]
    assert line in names
