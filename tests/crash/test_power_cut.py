"""The power fails: what was promised is on the disk, of a real file system after a real cut.

A trainer works on a loop-mounted file system that is shut down without writing its log; shared
memory is lost as well. Skipped where root, loop devices or mkfs are missing.
"""

import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import engram_store
from engram_store.errors import EngramStoreError
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import verify_store
from engram_store.recipes import Recipe
from tests.crash.actions import RUN
from tests.crash.cutting import NoPowerCutError, PoweredDisk, powered_disk
from tests.crash.killing import Crash, read_told
from tests.crash.summary import LINES
from tests.pairs import DIM, INITIAL

MODES = ("snapshot", "step", "group(5)")
ACKNOWLEDGED = (7, 16)
"""Lines of the trainer up to the first snapshot, and up to a step after the restore."""
_cuts: Counter[str] = Counter()


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PoweredDisk]:
    try:
        with powered_disk(request.param, tmp_path) as disk:
            yield disk
    except NoPowerCutError as error:
        pytest.skip(str(error))


class Cut:
    """One store, and one power cut."""

    def __init__(self, disk: PoweredDisk, recipe: Recipe, durability: str) -> None:
        self.disk = disk
        path = disk.mounted / "a.engram"
        engram_store.create(path, recipe, dim=DIM, initial=INITIAL)
        self.crash = Crash(path, recipe, durability)

    def run(self, lines: int, seconds: float = 0, *, syncs: bool = True) -> None:
        """Train until so many lines came, and so long after that; then cut the power."""
        shared, output = self.crash.shared_memory, b""
        with self.crash.start(RUN, syncs=syncs) as process:
            assert process.stdout is not None
            for _ in range(lines):
                output += process.stdout.readline()
            threading.Event().wait(seconds)
            self.disk.cut()
            # It goes on for a moment: nothing that it says now may be less true than before.
            output += b"".join(process.stdout.readlines(200))
            process.kill()
            output += process.stdout.read()
        shutil.rmtree(shared, ignore_errors=True)
        self.check(output)

    def check(self, output: bytes) -> None:
        """Power is back."""
        self.disk.unmount()
        self.disk.mount()
        report = verify_store(StorePaths(self.crash.path))
        assert report.ok, [f"{d.where}: {d.problem}" for d in report.damages]
        self.crash.check_lost(RUN, read_told(output))
        shutil.rmtree(self.crash.path)
        _cuts[self.disk.kind] += 1
        LINES["power cuts"] = (
            "power cuts: "
            + ", ".join(f"{number:,} on {kind}" for kind, number in _cuts.items())
            + ", 0 violations"
        )


@pytest.mark.parametrize("durability", MODES)
def test_what_was_acknowledged_is_there_after_a_power_cut(
    disk: PoweredDisk, recipe: Recipe, durability: str
) -> None:
    """Cut right after a snapshot, and right after a step, was acknowledged."""
    for wanted in ACKNOWLEDGED:
        Cut(disk, recipe, durability).run(wanted)


def test_a_trainer_that_does_not_sync_is_caught(disk: PoweredDisk, recipe: Recipe) -> None:
    """So that the other tests here are known to see what they are about."""
    with pytest.raises((AssertionError, EngramStoreError, OSError)):
        Cut(disk, recipe, "snapshot").run(ACKNOWLEDGED[1], syncs=False)


def cut_at_random(disk: PoweredDisk, recipe: Recipe, durability: str, times: int) -> None:
    rng = random.Random(f"{disk.kind} {durability}")
    for _ in range(times):
        Cut(disk, recipe, durability).run(rng.randint(1, len(RUN)), rng.uniform(0, 0.03))


@pytest.mark.parametrize("durability", MODES)
def test_a_power_cut_at_a_random_moment_leaves_what_was_promised(
    disk: PoweredDisk, recipe: Recipe, durability: str
) -> None:
    cut_at_random(disk, recipe, durability, 1)


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("durability", MODES)
def test_many_power_cuts_leave_what_was_promised(
    disk: PoweredDisk, recipe: Recipe, durability: str
) -> None:
    cut_at_random(disk, recipe, durability, 100)
