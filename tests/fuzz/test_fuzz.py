"""Every parser of bytes from outside, with every input that once broke one and with new ones."""

import base64
import importlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError

from engram_store.v1 import store_pb2 as pb
from tests.fuzz import planted, planted_parsers, runner
from tests.fuzz import registry as registry_module
from tests.fuzz.debts import DEBTS
from tests.fuzz.frames import decode_frames, encode_frames, mutate_frames
from tests.fuzz.mutators import SEPARATOR, mutate_json, mutate_message, mutate_parts
from tests.fuzz.registry import TARGETS

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
REGISTRY = registry_module.__name__
MUTATIONS = 100
RUNS = 300
SECONDS = 10
"""The most that atheris gets for one target, should the machine be very slow."""


@cache
def _results(command: str, *options: str, registry: str = REGISTRY) -> dict[str, str]:
    """What running targets in a process without threads said, by target."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", f"--registry={registry}", command, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = importlib.import_module(registry).TARGETS
    found: dict[str, str] = {}
    name = ""
    for line in run.stdout.splitlines():
        start = line.partition(":")[0]
        name = start if start in names else name
        found[name] = found.get(name, "") + line + "\n"
    found["stderr"] = run.stderr
    return found


def _assert_nothing_found(results: dict[str, str], name: str) -> None:
    said = results.get(name, f"it did not run: {results['stderr'][-2_000:]}")
    if "skipped" in said:
        pytest.skip(said)
    assert "nothing found" in said, said


def _needs_atheris() -> None:
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has wheels for CPython 3.11 on Linux x86-64")


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_kept_inputs_and_mutations_find_nothing(name: str) -> None:
    """The same inputs in every run, with or without atheris."""
    _assert_nothing_found(_results("replay", f"--mutations={MUTATIONS}"), name)


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_search_finds_nothing(name: str) -> None:
    """atheris, guided by what the inputs reach; `make fuzz` searches longer."""
    _needs_atheris()
    _assert_nothing_found(_results("fuzz", f"--runs={RUNS}", f"--seconds={SECONDS}"), name)


# ------------------------------------------------------------------ the harness itself


def _planted(name: str) -> str:
    """What replaying a target of `planted.py` said."""
    return _results("replay", "--mutations=20", registry=planted.__name__)[name]


def test_a_planted_error_is_reported_with_its_input() -> None:
    """An error of no project class fails the target, and the report reproduces it."""
    said = _planted("error")
    assert "KeyError" in said
    assert f"python -m tests.fuzz show error {base64.b64encode(planted.BUG).decode()}" in said


def test_a_refusal_is_no_bug() -> None:
    """Errors that the target allows are what it is for; the report counts what was tried."""
    assert _planted("refusal") == "refusal: 22 inputs, nothing found\n"


def test_a_planted_error_behind_several_bytes_is_found_by_searching() -> None:
    """Coverage leads to what blind mutation of the seed does not find."""
    _needs_atheris()
    said = _results("fuzz", "--runs=300000", "--seconds=60", "deep", registry=planted.__name__)
    assert "nothing found" in _planted("deep")
    assert "KeyError: 'reached'" in said["deep"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("crash", "SIGABRT"),
        ("hang", "longer than 1 s"),
        ("memory", "MemoryError"),
        ("exit", "ended in the middle"),
    ],
)
def test_what_ends_a_process_is_reported_with_its_input(name: str, problem: str) -> None:
    """Crashes, hangs and allocations above the bound are findings; later targets still run."""
    said = _planted(name)
    assert problem in said
    assert base64.b64encode(planted.BUG).decode() in said


def test_a_target_whose_first_seed_is_refused_fails() -> None:
    """Otherwise nothing behind the first check would be tested, and nobody would know."""
    said = _planted("refused-seed")
    assert "nothing found" not in said
    assert "ConfigError: even the first" in said


def test_a_paid_debt_must_be_removed() -> None:
    """A known bug that is fixed would otherwise hide the next one of its kind."""
    assert "remove it from debts.py" in _planted("paid-debt")


def test_a_debt_hides_only_its_own_error() -> None:
    """Another error in the same target is still found."""
    assert "nothing found" in _planted("debt")
    assert "ZeroDivisionError" in _planted("debt-and-bug")


def test_lines_of_the_corpus_are_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind a number sign is a remark."""
    monkeypatch.setattr(runner, "CORPUS", tmp_path)
    (tmp_path / "error.txt").write_text("# remark\n\nYnVnIQ==  # once a KeyError\n")

    assert runner.corpus(planted.TARGETS["error"]) == [b"bug!"]
    assert runner.corpus(planted.TARGETS["crash"]) == []


def test_kept_inputs_are_replayed() -> None:
    """The count of inputs says that the corpus of a target was run."""
    target = TARGETS["array"]
    kept = runner.corpus(target)
    expected = len([*target.seeds(), *kept]) + MUTATIONS
    assert kept
    assert f"array: {expected:,} inputs" in _results("replay", f"--mutations={MUTATIONS}")["array"]


def test_every_corpus_file_and_debt_belongs_to_a_target() -> None:
    """A renamed target would leave them behind unnoticed."""
    files = {path.stem for path in runner.CORPUS.glob("*.txt")}
    assert files <= TARGETS.keys()
    assert all(runner.corpus(TARGETS[name]) for name in files)
    assert {debt.target for debt in DEBTS} <= TARGETS.keys()


def test_the_readme_lists_every_target() -> None:
    """Its table says which parser each one covers."""
    listed = re.findall(r"\| `([a-z-]+)` \|", (FOLDER / "README.md").read_text())
    assert set(listed) == set(TARGETS)


@pytest.mark.parametrize("name", planted_parsers.TARGETS)
def test_a_bug_planted_in_a_parser_is_found(name: str) -> None:
    """The target would have found it in the store, by its seeds and a few mutations."""
    said = _results("replay", "--mutations=50", registry=planted_parsers.__name__)[name]
    if "skipped" in said:
        pytest.skip(said)
    assert planted_parsers.FOUND[name] in said, said


# ------------------------------------------------------------------ mutators


def _changed(mutate: Callable[..., bytes], data: bytes, count: int = 200) -> Iterator[bytes]:
    rng = random.Random(1)
    for _ in range(count):
        yield mutate(data, rng)


def test_mutated_json_stays_json_and_changes() -> None:
    """Otherwise nothing behind the parser of JSON would be reached."""
    data = b'{"a": [1, {"b": "x"}], "c": true}'
    results = set(_changed(mutate_json, data))
    assert len(results) > 50
    readable = [result for result in results if not result.startswith(b"[[[[")]
    assert all(json.loads(result) is not Ellipsis for result in readable)


def test_one_part_is_changed_and_the_others_stay() -> None:
    """Parts stand for files: a change of one must not move bytes to another."""
    mutate = mutate_parts(mutate_json, mutate_json)
    for result in _changed(mutate, b'{"a": 1}' + SEPARATOR + b'{"b": 2}'):
        first, second = result.split(SEPARATOR)
        assert first == b'{"a": 1}' or second == b'{"b": 2}'


def test_mutated_messages_can_be_parsed() -> None:
    """Fields change inside a message, not the bytes around them."""
    message = pb.SessionRequest(id=1, commit=pb.Commit(step=2, rates={1: 0.5}))
    results = set(_changed(mutate_message(pb.SessionRequest), message.SerializeToString()))
    assert len(results) > 20
    for result in results:
        pb.SessionRequest.FromString(result)


def test_frames_are_read_as_they_were_written_and_any_bytes_are_frames() -> None:
    """A message that is cut off is one as well: a stream may end anywhere."""
    frames = [(0, b"abc"), (2, b""), (1, b"x" * 300)]
    data = encode_frames(frames)
    assert decode_frames(data) == frames
    assert decode_frames(data[:-1]) == [*frames[:2], (1, b"x" * 299)]
    assert decode_frames(data[:5]) == [(0, b"ab")]
    assert decode_frames(b"\0\0") == []


def test_mutated_frames_keep_most_messages_readable() -> None:
    """Otherwise a session would end with its first request; the bytes before them stay there."""
    request = pb.SessionRequest(id=3, read=pb.Read(window=1, layer=2)).SerializeToString()
    mutate = mutate_frames(pb.SessionRequest, prefix=1)
    whole = 0
    results = set(_changed(mutate, b"\7" + encode_frames([(0, request)] * 4)))
    for result in results:
        for _, raw in decode_frames(result[1:]):
            whole += _is_request(raw)
    assert len(results) > 100
    assert whole > 3 * len(results)


def _is_request(raw: bytes) -> bool:
    try:
        pb.SessionRequest.FromString(raw)
    except DecodeError:
        return False
    return True
