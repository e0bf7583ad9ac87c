"""The demo through the real command line, and its parts."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.errors import ConfigError
from engram_store.layout.paths import StorePaths
from engram_store_client.demo.compare import different_losses, different_tables
from engram_store_client.demo.corpus import collect, limited, split_docstrings
from engram_store_client.demo.kills import plan_kills
from engram_store_client.demo.process import StoreProcess, StoreProcessError, require_server, serve
from engram_store_client.demo.settings import Settings
from engram_store_client.demo.stores import Stores, socket_directory
from engram_store_client.demo.waits import RowWaits
from engram_store_client.transport import connect
from tests.pairs import MakeStore, random_tokens

EMBEDDED = """
import json, sys
from pathlib import Path
from engram_store_client.demo.run import run_demo
from engram_store_client.demo.settings import Settings

settings = Settings.chosen(quick=True, steps=20, seed=1, threads=1)
print(json.dumps(run_demo(Path(sys.argv[1]), settings, embedded=True).to_json()))
"""
ENDED_BY_A_SIGNAL = """
import os, signal, sys
from pathlib import Path
from engram_store_client.demo.process import serve

store, directory, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with serve(store, directory / "run" / "a.sock", directory / "log") as process:
    print(process.pid, flush=True)
    os.kill(os.getpid(), number)
    signal.pause()
"""


def run_python(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def run_demo(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_python("from engram_store.cli import main; main()", "demo", *arguments)


def serving(path: Path, directory: Path) -> AbstractContextManager[StoreProcess]:
    return serve(path, directory / "run" / "a.sock", directory / "log")


def closed_cleanly(path: Path) -> bool:
    """Whether nobody has a store, and nothing of it was left to recover."""
    with engram_store.open(path, "train") as store:
        return store.recovery is not None and store.recovery.kind == "clean"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("demo")
    done = run_demo("--quick", "--json", "--dir", str(directory))
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_tables_learn_beyond_what_the_gates_learn_alone(report: dict[str, Any]) -> None:
    """Held-out perplexity: Engram < control, and only Engram's rows change."""
    engram, control = report["engram"], report["control"]
    assert engram["perplexities"]["prose"] < control["perplexities"]["prose"]
    assert engram["rows"]["changed"] > 1000
    assert engram["guards"]["backward_calls"] == 2 * engram["steps"]
    assert control["rows"]["changed"] == control["guards"]["backward_calls"] == 0


@pytest.mark.slow
def test_killed_stores_and_trainers_change_no_bit(report: dict[str, Any]) -> None:
    """The kills happen where they are meant to, take no committed step, and change nothing."""
    run = report["interrupted"]
    settings = Settings.chosen(quick=True, steps=None, seed=0, threads=2)
    plan = plan_kills(settings)
    before_commit, at_random = run["outages"]

    assert run["differences"] == report["failures"] == []
    assert run["rows"] == report["engram"]["rows"]["total"]
    assert run["losses"] == run["killed_after"] + 1 + run["compared_at"] - run["resumed_at"]
    assert run["found_step"] > run["killed_after"] == settings.kill_after
    assert before_commit["step"] == before_commit["found_step"] == plan.before_commit
    assert plan.at_random <= at_random["step"] <= at_random["found_step"] <= run["compared_at"]


@pytest.mark.slow
def test_both_arms_train_through_a_store_process(report: dict[str, Any]) -> None:
    """And say how rows reach them."""
    transports = {report[arm]["transport"] for arm in ("control", "engram")}
    assert transports == {"shared memory"}
    assert report["engram"]["wait_seconds"] > 0


@pytest.mark.slow
def test_the_demo_runs_without_store_processes(tmp_path: Path) -> None:
    """Embedded: only the trainer is killed, and nothing listens anywhere."""
    done = run_python(EMBEDDED, str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)

    assert report["interrupted"]["differences"] == report["interrupted"]["outages"] == []
    assert report["interrupted"]["found_step"] > report["interrupted"]["killed_after"]
    assert report["engram"]["transport"] == "one process"
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "store.log").exists()


def test_both_kills_fall_between_the_checkpoint_and_the_comparison() -> None:
    """For any number of steps and any seed; a step follows the second where there is room."""
    for steps in range(20, 200):
        for seed in range(3):
            settings = Settings.chosen(quick=True, steps=steps, seed=seed, threads=1)
            plan = plan_kills(settings)
            assert settings.snapshot_at <= plan.before_commit < plan.at_random < settings.compare_at
            assert plan.at_random < settings.compare_at - 1 or steps < 40
            assert 0 < plan.fraction < 1
            assert plan == plan_kills(settings)


def test_a_trainer_does_not_notice_that_its_store_was_killed(
    make_store: MakeStore, tmp_path: Path
) -> None:
    """The next rows only take longer; the record says that no step was lost."""
    path, tokens = make_store(), random_tokens(np.random.default_rng(0))
    with serving(path, tmp_path) as process:
        first = process.pid
        with connect(process.url) as session:
            before = session.announce(tokens).rows(1)[0].copy()
            process.kill(step=7)
            after = session.announce(tokens).rows(1)[0].copy()
        (outage,) = process.outages

        assert process.pid != first
        assert (outage.step, outage.found_step) == (7, 0)
        assert outage.seconds > 0
        np.testing.assert_array_equal(before, after)
    assert closed_cleanly(path)


def test_a_block_that_ends_during_an_outage_leaves_a_closed_store(
    make_store: MakeStore, tmp_path: Path
) -> None:
    """The store comes back first, so that nothing stays behind in shared memory."""
    path = make_store()
    with pytest.raises(ZeroDivisionError), serving(path, tmp_path) as process:  # noqa: PT012
        process.kill(step=0)
        raise ZeroDivisionError

    assert closed_cleanly(path)


def test_a_store_process_that_dies_by_itself_ends_the_training_with_its_log(
    make_store: MakeStore, tmp_path: Path
) -> None:
    """At once, and not as a trainer's error."""
    stores = Stores(tmp_path / "log", tmp_path / "run")
    tokens = random_tokens(np.random.default_rng(0))

    with (  # noqa: PT012 - the error may come from any of it
        pytest.raises(StoreProcessError, match=r"ended by itself \(killed by SIGKILL\)") as caught,
        stores.serve(make_store()) as served,
        served.train() as session,
    ):
        assert served.process is not None
        os.kill(served.process.pid, signal.SIGKILL)
        while True:
            session.announce(tokens).rows(1)

    assert "opened: clean" in str(caught.value)
    assert "--embedded" in str(caught.value)


def test_a_store_process_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    """With its own message and exit code."""
    with pytest.raises(StoreProcessError, match=r"did not come up \(exit code 3\)") as caught:
        StoreProcess(tmp_path / "nothing", tmp_path / "run" / "a.sock", tmp_path / "log")

    assert "no store here" in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_store_process_outlives_the_demo(
    make_store: MakeStore, tmp_path: Path, number: signal.Signals
) -> None:
    """Whether the demo can still clean up or not; the store is closed either way."""
    path = make_store()

    done = run_python(ENDED_BY_A_SIGNAL, str(path), str(tmp_path), str(int(number)))

    assert int(done.stdout) > 0
    assert done.returncode == -number
    with StorePaths(path).lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the end of the process that has it
    assert closed_cleanly(path)


def test_sockets_go_elsewhere_when_the_directory_has_no_name_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too long for Linux, or not expressible as an address; the temporary one is removed."""
    with socket_directory(tmp_path / "run", "a.sock") as chosen:
        assert chosen == tmp_path / "run"
    for name in ("x" * 100, "100%", "what?", "#1"):
        with socket_directory(tmp_path / name, "a.sock") as chosen:
            assert tmp_path not in chosen.parents
            assert chosen.stat().st_mode & 0o777 == 0o700
        assert not chosen.exists()
    (tmp_path / ("y" * 100)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("y" * 100)))
    with pytest.raises(ConfigError, match="TMPDIR"), socket_directory(Path("/x" * 60), "a.sock"):
        pass


def test_a_missing_server_is_named_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what to install, and the way without it."""
    require_server()
    monkeypatch.setitem(sys.modules, "grpc_health", None)

    with pytest.raises(ConfigError, match=r"grpc_health .* 'engram-store\[server\]'.*--embedded"):
        require_server()


def test_only_training_windows_count_as_waiting(make_store: MakeStore) -> None:
    """Evaluation reads through the same session; everything else is the session's own."""
    waits, tokens = RowWaits(), random_tokens(np.random.default_rng(0))
    with engram_store.open(make_store(), "train") as store:
        session = waits.measured(store)

        session.announce(tokens).rows(1)
        assert waits.seconds == 0
        window = session.announce(tokens, 0)
        rows, inverse = window.rows(1)

        assert waits.seconds > 0
        assert rows.shape == (len(window.row_ids(1)), 16)
        assert inverse.shape[:2] == tokens.shape
        assert session.step == window.step == 0


def test_one_wrong_bit_is_found() -> None:
    """In rows, in state, in losses; -0.0 and 0.0 are different bits."""
    rows, state = np.zeros((3, 2), np.uint16), np.zeros((3, 4), np.float32)
    wrong_rows, wrong_state = rows.copy(), state.copy()
    wrong_rows[1, 1], wrong_state[2, 3] = 1, -0.0

    assert different_tables([(1, rows, state)], [(1, rows.copy(), state.copy())]) == []
    assert different_tables([(1, rows, state)], [(1, wrong_rows, wrong_state)]) == [
        "rows of layer 1",
        "state of layer 1",
    ]
    assert different_losses({0: [1.0], 1: [2.0, 2.0]}, [1.0, 2.0, 3.0]) == []
    assert different_losses({0: [1.0], 1: [2.0, 2.5]}, [1.0, 2.0]) == ["loss of step 1"]


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    """Nothing in it is touched."""
    (tmp_path / "precious").write_text("mine")

    done = run_demo("--dir", str(tmp_path))

    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_docstrings_are_taken_out_of_code() -> None:
    """What is left is the code; other strings stay."""
    source = '"""Module."""\nx = "kept"\n\n\ndef f():\n    """Two\n    lines."""\n    return 1\n'

    code, docstrings = split_docstrings(source)

    assert code == 'x = "kept"\n\n\ndef f():\n    return 1\n'
    assert docstrings == "Module.\n\nTwo\nlines."


def test_no_text_is_on_two_sides() -> None:
    """Whole files: learned by the base, learned by the memory, or held out."""
    domains = collect(200_000, 200_000)

    texts = [text for domain in domains for text in (*domain.train, *domain.held_out)]
    assert len(set(texts)) == len(texts)
    assert all(domain.held_out for domain in domains)


def test_the_choice_of_texts_does_not_depend_on_the_order_they_are_found_in() -> None:
    """File systems list files as they like; a text that is there twice counts once."""
    texts = {f"file {n}": f"text {n % 8} " * 60 for n in range(20)}

    chosen = limited(texts, 2000)

    assert limited(dict(reversed(texts.items())), 2000) == chosen
    assert list(chosen) == list(limited(dict(reversed(texts.items())), 2000))
    assert 0 < len(chosen) == len(set(chosen.values())) < 8


def test_settings_survive_the_way_to_another_process(tmp_path: Path) -> None:
    """The trainer that is killed must use the numbers of the undisturbed one."""
    settings = Settings.chosen(quick=True, steps=20, seed=3, threads=1)

    settings.save(tmp_path / "settings.json")

    assert Settings.load(tmp_path / "settings.json") == settings
    assert 0 < settings.snapshot_at <= settings.kill_after < settings.compare_at < settings.steps
