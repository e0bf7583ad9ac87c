"""Runs targets, each in a child process with limits: what kills the child is a finding too.

The child notes every input in memory that it shares with its parent before it runs it, so the
parent knows which input killed it, whatever happened.
"""

import base64
import contextlib
import faulthandler
import importlib
import importlib.util
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.fuzz.mutators import mutate_bytes
from tests.fuzz.target import Target, run_input

MAX_INPUT_BYTES = 1 << 16
CORPUS = Path(__file__).parent / "corpus"
_FOUND = 99
"""Exit status of a child that met an error which is not allowed."""
_HEADER_BYTES = 24


@dataclass(frozen=True, slots=True)
class Outcome:
    """What running one target came to."""

    target: str
    inputs: int
    """How many were run, the failing one included."""
    problem: str = ""
    """Why it failed; empty: it did not."""
    data: bytes = b""
    """The input at which it failed."""

    def report(self) -> str:
        """For people: the problem and how to see it again."""
        if not self.problem:
            return f"{self.target}: {self.inputs:,} inputs, nothing found"
        if not self.inputs:
            return f"{self.target}: its first seed is refused, or nothing ran: {self.problem}"
        line = base64.b64encode(self.data).decode()
        return (
            f"{self.target}: {self.problem}\n"
            f"The input, number {self.inputs:,}, has {len(self.data):,} bytes. See it again with\n"
            f"python -m tests.fuzz show {self.target} {line}\n"
            f"and keep its base64 as a line of tests/fuzz/corpus/{self.target}.txt"
        )


class _Note:
    """The input that is being run and its number, in memory shared with a child."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEADER_BYTES + MAX_INPUT_BYTES)

    def write(self, data: bytes) -> None:
        data = data[:MAX_INPUT_BYTES]
        self._memory[_HEADER_BYTES : _HEADER_BYTES + len(data)] = data
        self._memory[8:16] = len(data).to_bytes(8, "little")
        self._memory[0:8] = (self.inputs + 1).to_bytes(8, "little")
        self._memory[16] = 1

    def finish(self) -> None:
        self._memory[16] = 0

    @property
    def running(self) -> bool:
        """Whether the input was not finished."""
        return bool(self._memory[16])

    @property
    def inputs(self) -> int:
        return int.from_bytes(self._memory[0:8], "little")

    @property
    def data(self) -> bytes:
        length = int.from_bytes(self._memory[8:16], "little")
        return self._memory[_HEADER_BYTES : _HEADER_BYTES + length]


def corpus(target: Target) -> list[bytes]:
    """Inputs that once showed a bug; '#' begins a remark."""
    file = CORPUS / f"{target.name}.txt"
    if not file.exists():
        return []
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [base64.b64decode(line, validate=True) for line in lines if line]


def missing(target: Target) -> list[str]:
    """Modules that the target needs and that are not installed."""
    return [name for name in target.needs if importlib.util.find_spec(name) is None]


def replay(target: Target, mutations: int) -> Outcome:
    """Run seeds, corpus and the same few mutations every time; needs no atheris."""
    return _in_child(target, lambda run: _replay(target, mutations, run))


def _replay(target: Target, mutations: int, run: Callable[[bytes], None]) -> None:
    start = [*target.seeds(), *corpus(target)]
    for data in start:
        run(data)
    for debt in target.debts:
        try:
            target.check(debt.example)
        except Exception as error:
            if debt.explains(error):
                continue
        raise AssertionError(f"this debt is paid, remove it from debts.py: {debt.reason}")
    rng = random.Random(target.name)
    for _ in range(mutations):
        data = rng.choice(start)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = _mutate(target, data, rng, mutate_bytes)
        run(data)


def _mutate(target: Target, data: bytes, rng: random.Random, plain: Any) -> bytes:
    """Three of four mutations know the structure, if the target has such a mutator."""
    if target.mutate is not None and rng.randrange(4):
        return target.mutate(data, rng)
    return bytes(plain(data, rng))


def fuzz(target: Target, *, runs: int, seconds: int, seed: int = 1) -> Outcome:
    """Let atheris look for inputs that reach new code; one of the two limits ends it."""
    return _in_child(target, lambda run: _fuzz(target, runs, seconds, seed, run))


def _fuzz(
    target: Target, runs: int, seconds: int, seed: int, run: Callable[[bytes], None]
) -> NoReturn:
    atheris = importlib.import_module("atheris")

    def mutate(data: bytes, max_size: int, mutation: int) -> bytes:
        changed = _mutate(
            target, data, random.Random(mutation), lambda data, _: atheris.Mutate(data, max_size)
        )
        return changed[:max_size]

    directory = Path(tempfile.mkdtemp(prefix="engram-fuzz-"))
    for number, data in enumerate([*target.seeds(), *corpus(target)]):
        (directory / f"{number:04d}").write_bytes(data)
    options = [
        f"-runs={runs}",
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={MAX_INPUT_BYTES}",
        "-timeout=0",  # as is the limit on time
        f"-artifact_prefix={directory}/",
        "-rss_limit_mb=0",  # the limit on address space is ours
        "-verbosity=0",
        "-print_final_stats=0",
    ]
    arguments = [sys.argv[0], *options, str(directory)]
    atheris.Setup(arguments, run, custom_mutator=mutate)
    atheris.Fuzz()
    raise AssertionError("atheris ends the process")


def _in_child(target: Target, work: Callable[[Callable[[bytes], None]], None]) -> Outcome:
    """Do `work`, which calls what it is given with every input, in a child of its own."""
    note = _Note()
    with tempfile.TemporaryFile() as output, _scratch() as directory:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _child(target, work, note, output.fileno(), directory)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        said = output.read().decode(errors="replace")
    problem = _problem(target, os.waitstatus_to_exitcode(status), note)
    if not problem:
        return Outcome(target.name, note.inputs)
    return Outcome(target.name, note.inputs, f"{problem}\n{said[-6_000:]}", note.data)


def _problem(target: Target, code: int, note: _Note) -> str:
    """What the end of a child means; empty: it did everything and found nothing."""
    if code == 0:
        return "the process ended in the middle of an input" if note.running else ""
    if code == -signal.SIGALRM:
        return f"an input took longer than {target.seconds} s"
    if code == _FOUND:
        return "an error that is not allowed"
    return f"the process died ({signal.Signals(-code).name if code < 0 else code})"


class _scratch:  # noqa: N801 - used like a function
    """A temporary directory that is the working directory of a child, removed by the parent."""

    def __enter__(self) -> str:
        parent = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - files in memory
        self._directory = tempfile.TemporaryDirectory(prefix="engram-fuzz-", dir=parent)
        return self._directory.name

    def __exit__(self, *exc: object) -> None:
        self._directory.cleanup()


def _child(
    target: Target,
    work: Callable[[Callable[[bytes], None]], None],
    note: _Note,
    output: int,
    directory: str,
) -> NoReturn:
    """Never returns: the child must not go on with what its parent was doing."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(output)
    os.chdir(directory)
    tempfile.tempdir = directory
    status = 1
    try:
        # The first seed must be fine, or nothing behind the first check would ever be reached.
        # Its imports take memory too, which is not what is limited.
        target.check(next(iter(target.seeds())))
        _limit_memory(target.memory_bytes)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        work(lambda data: _run(target, data, note))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(target: Target, data: bytes, note: _Note) -> None:
    note.write(data)
    signal.alarm(target.seconds)
    try:
        run_input(target, data)
    except BaseException:
        # Room to say so, should it be memory that ran out.
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(_FOUND)
    signal.alarm(0)
    note.finish()


def _limit_memory(memory_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + memory_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def instrumented() -> Any:
    """Context in which our modules are imported with atheris' coverage counters."""
    atheris = importlib.import_module("atheris")
    return atheris.instrument_imports(
        include=["engram_store", "engram_store_client", "engram_store_server"],
        # Compiled by numba from their bytecode, which must be their own.
        exclude=["engram_store.optimizers.kernels", *_modules("engram_store.kernels")],
    )


def _modules(package: str) -> list[str]:
    directory = Path(__file__).parents[2].joinpath(*package.split("."))
    return [f"{package}.{path.stem}" for path in directory.glob("*.py")]


def reproduce(target: Target, data: bytes) -> Iterator[str]:
    """Run one input here and tell what comes of it."""
    with _scratch() as directory, contextlib.chdir(directory):
        tempfile.tempdir = directory
        try:
            target.check(data)
        except target.allowed as error:
            yield f"refused, as it may be: {type(error).__name__}: {error}"
        else:
            yield "accepted"
