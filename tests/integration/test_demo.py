"""The demo through the real command line, and the parts of it that others may copy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_store_client.demo.corpus import collect, limited, split_docstrings
from engram_store_client.demo.resume import different_losses, different_tables
from engram_store_client.demo.settings import Settings


def run_demo(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from engram_store.cli import main; main()", "demo"]
    command += arguments
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


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
def test_a_killed_and_resumed_run_is_bit_equal(report: dict[str, Any]) -> None:
    """The kill takes no committed step, and the resumed run ends where the other was."""
    resumed = report["resumed"]
    assert resumed["differences"] == []
    assert resumed["found_step"] > resumed["killed_after"] >= resumed["resumed_at"]
    assert resumed["rows"] == report["engram"]["rows"]["total"]
    assert report["failures"] == []


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
    """The killed run must use the numbers of the uninterrupted one."""
    settings = Settings.chosen(quick=True, steps=20, seed=3, threads=1)

    settings.save(tmp_path / "settings.json")

    assert Settings.load(tmp_path / "settings.json") == settings
    assert 0 < settings.snapshot_at <= settings.kill_after < settings.compare_at < settings.steps
