"""A kill at the n-th system call that changes a file, and one that the kernel itself refuses.

Real processes under strace, which counts the calls of each thread for itself. Where it is missing
or may not trace, the tests are skipped; failpoints and faulty disks cover the same ground.
"""

import os
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest

from engram_store.engine.recovery import RecoveryKind
from engram_store.recipes import Recipe
from tests.crash.actions import RUN
from tests.crash.killing import KILLED, Crash, read_told
from tests.crash.summary import LINES
from tests.pairs import MakeStore

CALLS = ("pwrite64", "fdatasync", "fsync", "rename", "link", "unlink", "mkdir", "rmdir")
"""Also in the forms that take a directory."""
_FORMS = {name: (name,) for name in CALLS} | {
    "rename": ("rename", "renameat", "renameat2"),
    "link": ("link", "linkat"),
    "unlink": ("unlink", "unlinkat"),
    "mkdir": ("mkdir", "mkdirat"),
}
_LINE = re.compile(r"(\d+) +(\w+)\(")
MODES = ("snapshot", "step", "group(5)")
_killed: Counter[str] = Counter()


@cache
def why_not() -> str:
    """Why nothing can be traced here; empty where it can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    try:
        tried = subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True, timeout=30)
    except subprocess.TimeoutExpired:
        return "strace does not come to an end"
    return "" if tried.returncode == 0 else f"strace may not trace: {tried.stderr.decode()[:200]}"


@pytest.fixture
def make_crash(make_store: MakeStore, recipe: Recipe) -> Callable[[str], Crash]:
    if why_not():
        pytest.skip(why_not())
    return lambda name: Crash(make_store(name), recipe)


def forms(call: str) -> str:
    """As strace wants them; a question mark forgives an architecture that has no such call."""
    return ",".join(f"?{form}" for form in _FORMS[call])


def calls_made(crash: Crash, log: Path) -> dict[str, int]:
    """How often each call is made in a run at the least by the thread that makes most of them."""
    traced = ",".join(forms(call) for call in CALLS)
    under = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={traced}"]
    with crash.start(RUN, under=under, env=quiet()) as process:
        process.communicate()
    assert process.returncode == 0
    made: Counter[tuple[str, str]] = Counter()
    for line in log.read_text().splitlines():
        if match := _LINE.match(line):
            made[match[2], match[1]] += 1
    return {
        call: max(made.get((form, thread), 0) for form in _FORMS[call] for _, thread in made)
        for call in CALLS
    }


def quiet() -> dict[str, str]:
    """The environment of a trainer whose interpreter writes no files of its own."""
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def kill_at(crash: Crash, call: str, number: int) -> bool:
    """Kill the trainer there; returns whether it came so far."""
    inject = f"inject={forms(call)}:signal=SIGKILL:when={number}"
    under = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={forms(call)}", "-e", inject]
    with crash.start(RUN, under=under, env=quiet()) as process:
        told = read_told(process.communicate()[0])
    killed = process.returncode == KILLED
    assert killed or told.ended, f"the trainer failed by itself: {process.returncode}"
    shared = crash.shared_memory
    report = crash.check(RUN, len(RUN) if told.ended else told.actions)
    assert report.kind is not RecoveryKind.ROLLED_BACK
    assert not shared.exists()
    shutil.rmtree(crash.path)
    return killed


def count_kills(call: str) -> None:
    _killed[call] += 1
    LINES["system calls"] = (
        f"system calls: {_killed.total():,} kills at {len(_killed)} kinds of calls, 0 violations"
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_kill_at_a_system_call_loses_nothing(
    make_crash: Callable[[str], Crash], call: str, tmp_path: Path
) -> None:
    """At one of the first, where there is much left to lose, in one mode for each kind of call."""
    crash = make_crash("a")
    crash.durability = MODES[CALLS.index(call) % len(MODES)]
    number = random.Random(call).randint(1, 4)
    if kill_at(crash, call, number):
        count_kills(call)


def all_of(made: int) -> Iterable[int]:
    return range(1, made + 1)


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("durability", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_a_kill_at_every_system_call_loses_nothing(
    make_crash: Callable[[str], Crash], call: str, durability: str, tmp_path: Path
) -> None:
    probe = make_crash("probe")
    probe.durability = durability
    made = calls_made(probe, tmp_path / "calls")[call]
    assert made, f"no {call} in the whole run"
    for number in all_of(made):
        crash = make_crash(f"{number}")
        crash.durability = durability
        if kill_at(crash, call, number):
            count_kills(call)


@pytest.mark.parametrize("durability", MODES[:2])
def test_a_sync_that_the_kernel_refuses_costs_nothing(
    make_crash: Callable[[str], Crash], durability: str
) -> None:
    """The trainer ends with an error that names the file; the next one has every step."""
    crash = make_crash("a")
    crash.durability = durability
    inject = "inject=fdatasync:error=EIO:when=9+"
    under = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", inject]
    with crash.start(RUN, under=under, env=quiet(), stderr=subprocess.PIPE) as process:
        output, errors = process.communicate()
    assert process.returncode == 1
    assert b"DiskFaultError" in errors
    assert str(crash.path).encode() in errors
    assert b"the host's log" in errors

    assert crash.check(RUN, read_told(output).actions).kind is RecoveryKind.RECOVERED
