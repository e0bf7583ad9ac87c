"""A store whose trainer is killed, or whose host is lost, and what must be found afterwards."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engram_store
from engram_store.engine.memtable import _IDENTITY
from engram_store.engine.recovery import RecoveryKind, RecoveryReport
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.testing import MemorySession
from tests.crash.actions import Action, do, pins_after, pins_of, steps
from tests.crash.faults import digest_of, oracle_digest
from tests.pairs import (
    INITIAL,
    assert_same_tables,
    make_oracle,
    memtable_directory,
    specs_of,
    tables_of,
    tiny_overlay_bytes,
)

TRAINER = Path(__file__).with_name("trainer.py")
KILLED = -9


@dataclass(frozen=True)
class Told:
    """What a trainer said before it died."""

    actions: int = 0
    """Actions that came back; -1: the store was not even open."""
    durable: int = 0
    """The durable step after the last of them."""
    ended: bool = False
    """It was about to close the store."""


def read_told(output: bytes) -> Told:
    """From the trainer's lines."""
    lines = output.decode().splitlines()
    done = [line.split() for line in lines if line not in ("open", "end")]
    durable = int(done[-1][1]) if done else 0
    return Told(len(done) if lines else -1, durable, "end" in lines)


def other_boot(data: bytearray) -> None:
    """Make a memtable one of before the host's last boot."""
    offset = _IDENTITY.fields["boot_id"][1]  # type: ignore[index]
    data[offset : offset + 8] = b"deadbeef"


class Crash:
    """A store, its trainers, and how they end."""

    def __init__(self, path: Path, recipe: Recipe, durability: str = "snapshot") -> None:
        self.path, self.recipe, self.durability = path, recipe, durability
        self.overlay_bytes = tiny_overlay_bytes(specs_of(recipe))
        self.store_id = engram_store.inspect(path).metadata.store_id
        self.memtable_dir: Path | None = None

    @property
    def shared_memory(self) -> Path:
        return memtable_directory(self.path, self.store_id)

    def start(
        self,
        actions: Sequence[Action],
        *,
        kill: tuple[str, int] | None = None,
        kill_after: str | None = None,
        under: Sequence[str] = (),
        syncs: bool = True,
        **more: Any,
    ) -> "subprocess.Popen[bytes]":
        """Start a trainer, under a command that runs commands; without `syncs` a broken one."""
        plan = {
            "overlay_bytes": self.overlay_bytes,
            "durability": self.durability,
            "actions": actions,
            "kill": kill,
            "kill_after": kill_after,
            "syncs": syncs,
            "memtable_dir": self.memtable_dir and str(self.memtable_dir),
        }
        command = [*under, sys.executable, str(TRAINER), str(self.path), json.dumps(plan)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, **more)

    def run_until_killed(self, actions: Sequence[Action], **how: Any) -> Told:
        """Run until the kill."""
        with self.start(actions, **how) as process:
            told = read_told(process.communicate()[0])
        assert process.returncode == KILLED, "the point was never reached"
        return told

    def run(self, actions: Sequence[Action], **how: Any) -> int:
        """Run until the kill; returns how many actions were acknowledged."""
        return self.run_until_killed(actions, **how).actions

    def open(self) -> Store:
        return engram_store.open(
            self.path, "train", overlay_bytes=self.overlay_bytes, durability=self.durability
        )

    def oracle_after(self, actions: Sequence[Action]) -> MemorySession:
        oracle: MemorySession = make_oracle(self.recipe, INITIAL)
        oracle.snapshot()
        for action in actions:
            do(oracle, action)
        return oracle

    def check(self, actions: Sequence[Action], acknowledged: int) -> RecoveryReport:
        """Reopen, compare with the oracle, finish the run, compare again."""
        oracle = self.oracle_after(actions[: max(acknowledged, 0)])
        with self.open() as store:
            report = store.recovery
            assert report is not None
            assert report.step == store.step
            _check_pins(store, actions, acknowledged)
            remaining = list(actions[max(acknowledged, 0) :])
            if remaining and store.step != oracle.step:
                do(oracle, remaining.pop(0))
            assert store.step == oracle.step
            assert_same_tables(store, oracle)
            last = 1 + max(action.number for action in actions if action.kind == "step")
            for action in [*remaining, *steps(last, last + 2)]:
                do(store, action)
                do(oracle, action)
            assert_same_tables(store, oracle)
        with self.open() as store:
            assert store.recovery == RecoveryReport(RecoveryKind.CLEAN, oracle.step, 0)
            assert_same_tables(store, oracle)
            _check_pins(store, actions, len(actions))
        return report

    def change_memtables(self) -> None:
        """What is in shared memory is of another boot."""
        for path in self.shared_memory.iterdir():
            data = bytearray(path.read_bytes())
            other_boot(data)
            path.write_bytes(data)

    def check_lost(self, actions: Sequence[Action], told: Told) -> int:
        """The host was lost: no less is found than was promised, and nothing else.

        Returns:
            How many of the actions are in what was found.
        """
        last = min(told.actions + 1, len(actions))
        under_way = actions[told.actions].kind if 0 <= told.actions < len(actions) else ""
        kept = _newest_kept(actions[: max(told.actions, 0)])
        with self.open() as store:
            found = store.step, digest_of(tables_of(store))
            assert store.recovery is not None
            assert store.recovery.kind is not RecoveryKind.RECOVERED, "there was nothing in memory"
            _check_pins(store, actions, told.actions)
            same = [done for done in range(kept, last + 1) if self._is(actions[:done], found)]
            assert same, f"step {store.step} is no state after action {kept}, or before {last}"
            if under_way != "restore" and not told.ended:
                assert store.step >= told.durable, "a durable step is gone"
            if self.durability == "snapshot" and not told.ended:
                assert kept in same or under_way in ("snapshot", "restore")
            oracle = self.oracle_after(actions[: same[0]])
            for action in steps(store.step, store.step + 3, seed=7):
                do(store, action)
                do(oracle, action)
            assert_same_tables(store, oracle)
        return same[0]

    def _is(self, actions: Sequence[Action], found: tuple[int, bytes]) -> bool:
        """Whether the oracle is there after these actions."""
        oracle = self.oracle_after(actions)
        return (oracle.step, oracle_digest(oracle)) == found


def _check_pins(store: Store, actions: Sequence[Action], acknowledged: int) -> None:
    """Pins outlive process and host; what was under way is done or not."""
    done = max(acknowledged, 0)
    assert pins_of(store) in [pins_after(actions[:count]) for count in (done, done + 1)]


def _newest_kept(actions: Sequence[Action]) -> int:
    """How many actions there are up to the last one that is kept whatever happens to the host."""
    kinds = [action.kind for action in actions]
    return max(
        (i + 1 for i, kind in enumerate(kinds) if kind in ("snapshot", "restore")), default=0
    )
