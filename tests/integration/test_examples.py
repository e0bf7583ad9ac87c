"""The examples, run as a user runs them, with `--toy`.

Those that show something of their own about processes are processes; the others run here, where
torch is imported already.
"""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
# A user's warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore")
Started = dict[str, "subprocess.Popen[str]"]


def start(directory: Path, script: str, *arguments: str) -> "subprocess.Popen[str]":
    """Begin an example as a process; several at once share the wait for their imports."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), "--toy", *arguments],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def started(directory: Path) -> Iterator[Started]:
    processes = {
        "plain": start(directory, "plain_loop.py"),
        "4b": start(directory, "train_4b_24gb.py", "--lora", "2", "--out", "4b"),
        "killed": start(directory, "resume.py", "--out", "killed", "--die-after", "5"),
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny models do nothing but wait for each other, on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Here:
    """Runs an example in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.syspath_prepend(str(EXAMPLES))

    def __call__(self, script: str, *arguments: str) -> str:
        """What it printed."""
        self._monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return self._capsys.readouterr().out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


def output(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """What it printed, once it has ended with that exit code."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"{out}\n{err}"
    return out


def test_every_example_is_run_here() -> None:
    """And explained in the folder's README."""
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"ingredients.py"}
    assert scripts == set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text())) - {
        "ingredients.py"
    }
    readme = (EXAMPLES / "README.md").read_text()
    assert all(name in readme for name in scripts)


def test_the_lora_example_trains_all_three_arms(started: Started, here: Here) -> None:
    told = here("lora_plus_engram.py", "--toy")
    arms = re.findall(r"^(LoRA|Engram|LoRA and Engram) +\d\.\d+$", told, re.MULTILINE)
    assert arms == ["LoRA", "Engram", "LoRA and Engram"]


def test_the_4b_plan_is_refused_on_a_small_card(
    here: Here, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of real sizes: nothing is made, and it says what would fit."""
    with pytest.raises(SystemExit, match="What would fit:\n  a base of 8bit"):
        here("train_4b_24gb.py", "--plan-only", "--vram", "12GB", "--out", str(directory / "no"))
    assert "VRAM are needed" in capsys.readouterr().out
    assert not (directory / "no").exists()


def test_the_plain_loop_learns(started: Started) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output(started["plain"]))]
    assert losses[-1] < losses[0] - 0.2


def test_the_4b_example_plans_and_trains(started: Started, directory: Path) -> None:
    """The plan comes first; gates, a store and a checkpoint are left."""
    told = output(started["4b"])
    assert told.index("It fits.") < told.index("trainable params")
    assert "rows_pushed=0" not in told
    assert (directory / "4b" / "engram" / "engram_dense.safetensors").is_file()


def test_a_killed_example_goes_on_to_the_same_bits(
    started: Started, here: Here, directory: Path
) -> None:
    """It dies after step 5, begins again at the checkpoint of step 4, and ends as undisturbed."""
    last = "step 6, bits "
    whole = here("resume.py", "--toy", "--out", str(directory / "whole")).partition(last)[2]
    assert last not in output(started["killed"], code=9)

    told = here("resume.py", "--toy", "--out", str(directory / "killed"))

    assert "checkpoint-4" in told
    assert told.partition(last)[2] == whole != ""
