"""Snapshots on the command line and over the wire: the same operations, the same answers."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import engram_store
from engram_store import snapshots
from engram_store.cli import main
from engram_store.errors import ConfigError, ProtocolError, SnapshotMismatchError
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import verify_store
from engram_store_client import connect_admin
from engram_store_client.remote.administration import Administration
from engram_store_server.config import load_config
from engram_store_server.home import open_store
from tests.crash.actions import Action, do
from tests.pairs import MakePair, Pair, assert_same_tables, files_of
from tests.servers import serving

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line: exit code, and what it said on standard output and error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return command


@pytest.fixture
def busy(make_pair: MakePair) -> Pair:
    """Snapshots at 0 to 4, a fold after the second."""
    pair = make_pair(options={"fold_ratio": 1e9})
    pair.snapshot()
    for step in range(1, 5):
        pair.train(1)
        pair.snapshot()
        if step == 2:
            pair.store.fold()
    return pair


def steps_of(out: str) -> list[int]:
    return [entry["step"] for entry in json.loads(out)]


def test_snapshots_are_listed_for_people_and_as_json(busy: Pair, run: Run) -> None:
    """Lines fit 80 columns; sizes and names are in both."""
    snapshots.pin(busy.path, 1, "before-the-rate-was-changed")
    code, out, _ = run("snapshots", busy.path)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["step", "made", "(UTC)"]
    assert "pins" in lines[0]
    assert "g0001" in lines[1]
    assert "g0002" in lines[5]
    assert all(len(line) <= 80 for line in lines)
    code, out, _ = run("snapshots", busy.path, "--json")
    listed = json.loads(out)
    assert code == 0
    assert listed == [info.to_json() for info in snapshots.describe(busy.path)]
    assert listed[1]["pins"] == ["before-the-rate-was-changed"]
    assert listed[4]["generations"] == {"1": 2, "2": 2}


def test_a_snapshot_is_made_pinned_and_gone_back_to_by_name(busy: Pair, run: Run) -> None:
    """Going back past a pin says how to go on."""
    busy.store.close()
    code, out, _ = run("snapshot", busy.path, "--pin", "best")
    assert code == 0
    assert "step 4, pinned as best" in out
    assert run("pin", busy.path, 2, "two")[0] == 0
    code, _, err = run("pin", busy.path, 3, "two")
    assert code == 2
    assert "--move" in err
    assert "step 3" in run("pin", busy.path, 3, "two", "--move")[1]
    code, _, err = run("restore", busy.path, "two")
    assert code == 2
    assert "engram-store unpin" in err
    assert "any more" in run("unpin", busy.path, "best")[1]
    code, out, _ = run("restore", busy.path, "two")
    assert code == 0
    assert "At step 3 again" in out
    assert steps_of(run("snapshots", busy.path, "--json")[1]) == [0, 1, 2, 3]
    busy.oracle.restore(3)
    with engram_store.open(busy.path, snapshot="two") as store:
        assert_same_tables(store, busy.oracle)
    for words in (("restore", "9best"), ("restore", "-1"), ("pin", "x/y", "a"), ("unpin", "3")):
        code, _, err = run(words[0], busy.path, *words[1:])
        assert code == 2, words
    assert run("restore", busy.path, "nothing")[0] == 2


def test_gc_says_what_goes_before_and_after(busy: Pair, run: Run) -> None:
    """A store that is trained is collected by its own process."""
    snapshots.pin(busy.path, 1, "one")
    code, out, _ = run("gc", busy.path, "--keep", 2, "--dry-run")
    assert code == 0
    assert "2 snapshots (steps 0, 2)" in out
    assert "would be removed" in out
    assert "step 1 stays: pinned as one" in out
    assert "3 snapshots left" in out
    code, _, err = run("gc", busy.path, "--keep", 2)
    assert code == 3
    assert "open for training" in err
    assert run("gc", busy.path, "--keep", 0)[0] == 2
    busy.store.close()
    code, out, _ = run("gc", busy.path, "--keep", 2, "--json")
    assert code == 0
    assert json.loads(out)["removed"] == [0, 2]
    assert steps_of(run("snapshots", busy.path, "--json")[1]) == [1, 3, 4]
    assert "0 snapshots and 0 base generations" in run("gc", busy.path)[1]


@pytest.mark.parametrize("command", ["export", "restore"])
def test_an_export_by_command_is_a_store(
    busy: Pair, run: Run, tmp_path: Path, command: str
) -> None:
    """While the store is trained; `restore --to` is the same."""
    target = tmp_path / "made.engram"
    before = files_of(busy.path)
    arguments = {
        "export": ("export", busy.path, "2", target, "--copy"),
        "restore": ("restore", busy.path, "2", "--to", target),
    }[command]

    code, out, _ = run(*arguments)

    assert code == 0
    assert engram_store.inspect(target).metadata.store_id in out
    assert files_of(busy.path) == before
    assert verify_store(StorePaths(target)).ok
    busy.oracle.restore(2)
    with engram_store.open(target) as store:
        assert_same_tables(store, busy.oracle)
    code, _, err = run(*arguments)
    assert code == 2
    assert "already exists" in err


# ---------------------------------------------------------------------- over the wire


@pytest.fixture
def process(busy: Pair, tmp_path: Path) -> Iterator[str]:
    """The URL of a server of the store."""
    with serving(busy.store, f"unix:{tmp_path}/s"):
        yield f"unix:{tmp_path}/s"


@contextmanager
def _admin(url: str) -> Iterator[Administration]:
    with connect_admin(url) as admin:
        yield admin


def test_a_process_does_all_of_it(busy: Pair, process: str) -> None:
    """What it tells is what the directory tells."""
    admin: AbstractContextManager[Administration] = _admin(process)
    with admin as store:
        assert store.describe_snapshots() == snapshots.describe(busy.path)
        ref = store.pin(1, "one")
        assert store.pin("one", "uno") == ref == store.pin(ref, "one")
        with pytest.raises(ConfigError, match="is the snapshot at step 1"):
            store.pin("newest", "one")
        assert store.pin("newest", "uno", move=True).step == 4
        for name in ("../x", ""):
            with pytest.raises(ConfigError, match="cannot be the name of a pin"):
                store.pin(1, name)
        with pytest.raises(ConfigError, match="cannot be the name of a pin"):
            store.snapshot(pin="a/b")
        with pytest.raises(SnapshotMismatchError):
            store.unpin("two")
        with pytest.raises(ProtocolError, match="'uno'"):
            store.restore("one")
        store.unpin("uno")
        planned = store.collect_garbage(2, dry_run=True)
        assert planned.removed == (0, 2)
        assert planned.pinned == {1: ("one",)}
        done = store.collect_garbage(2)
        assert (done.removed, done.freed_bytes) == (planned.removed, planned.freed_bytes)
        assert store.collect_garbage().removed == ()
        with pytest.raises(ConfigError, match="at least 1"):
            store.collect_garbage(0)
        assert store.snapshots() == [1, 3, 4]
        assert store.restore("one") == 1
        busy.oracle.restore(1)
        busy.check()
        assert store.snapshot(pin="again") == ref
        assert [info.pins for info in store.describe_snapshots()] == [("again", "one")]


def test_a_process_keeps_as_many_as_its_setting_says(make_pair: MakePair) -> None:
    """`keep_snapshots` of `serve` is that of `open`."""
    pair = make_pair()
    pair.store.close()
    config, _ = load_config({}, {"ENGRAM_STORE_KEEP_SNAPSHOTS": "2"}, {"data_dir": pair.path})
    assert config.keep_snapshots == 2
    with open_store(StorePaths(pair.path), config, sharers=1) as store:
        for step in range(4):
            do(store, Action("step", step))
            store.snapshot()
    assert engram_store.inspect(pair.path).snapshots == (3, 4)
    with pytest.raises(ConfigError, match="keep_snapshots is '0'"):
        load_config({}, {"ENGRAM_STORE_KEEP_SNAPSHOTS": "0"}, {"data_dir": pair.path})


def test_commands_take_the_url_too(busy: Pair, process: str, run: Run, tmp_path: Path) -> None:
    """Only exporting needs the directory, and says so."""
    assert steps_of(run("snapshots", process, "--json")[1]) == [0, 1, 2, 3, 4]
    assert "step 2" in run("pin", process, 2, "two")[1]
    busy.train(1)
    code, out, _ = run("snapshot", process, "--pin", "five")
    assert code == 0
    assert "step 5, pinned as five" in out
    assert "(steps 0, 1, 3, 4)" in run("gc", process, "--keep", 1, "--dry-run")[1]
    assert json.loads(run("gc", process, "--keep", 1, "--json")[1])["removed"] == [0, 1, 3, 4]
    assert "no pin any more" in run("unpin", process, "five")[1]
    code, _, err = run("restore", process, "two", "--to", tmp_path / "x")
    assert code == 2
    assert "directory" in err
    assert "At step 2 again" in run("restore", process, "two")[1]
    assert run("pin", process, 2, "no/name")[0] == 2
