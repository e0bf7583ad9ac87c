"""Any order of calls: a store equals its oracle after every one of them."""

import errno
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import engram_store
from engram_store.engine import Engine
from engram_store.engine.recovery import RecoveryKind
from engram_store.errors import DiskFullError, DuplicateStepError, StepGapError
from engram_store.recipes import Recipe, engram
from engram_store.session import SnapshotRef
from engram_store.testing import FaultyDisk, MemorySession
from tests.pairs import (
    INITIAL,
    Pair,
    TwinWindow,
    assert_same_tables,
    make_oracle,
    memtable_directory,
    random_tokens,
    specs_of,
    tiny_overlay_bytes,
)

SHAPES = st.sampled_from([(1, 3), (2, 20), (2, 40)])
OPEN_WINDOWS = 3
"""With two more of the largest shape: 3,200 look-ups, which the least memtable holds."""
RECIPE: Recipe = engram(
    token_map=np.arange(500), layers=[1, 2], rows_per_head=2_000, orders=(2, 3), heads=4, pad_id=2
)


class StoreMachine(RuleBasedStateMachine):
    """A store with the least overlay and eager folds, beside `MemorySession`."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "a.engram"
        self.windows: list[TwinWindow] = []
        self.refs: dict[int, SnapshotRef] = {}
        self.pair: Pair | None = None

    @initialize(
        dtype=st.sampled_from(["bfloat16", "float32"]),
        optimizer=st.sampled_from(["sgd", "rowwise_adagrad", "adam"]),
        seed=st.integers(0, 99),
        zeros=st.booleans(),
        durability=st.sampled_from(["snapshot", "step"]),
    )
    def create(self, dtype: str, optimizer: str, seed: int, zeros: bool, durability: str) -> None:
        self.settings = {"dtype": dtype, "optimizer": optimizer}
        self.durability = durability
        initial = None if zeros else INITIAL
        engram_store.create(self.path, RECIPE, dim=16, initial=initial, **self.settings)  # type: ignore[arg-type]
        oracle: MemorySession = make_oracle(RECIPE, initial, **self.settings)
        oracle.snapshot()
        self.pair = Pair(self.open(), oracle, np.random.default_rng(seed))
        self.store_id = self.pair.store.store_id

    def open(self) -> engram_store.Session:
        self.disk = FaultyDisk()
        return engram_store.open(
            self.path,
            "train",
            overlay_bytes=tiny_overlay_bytes(specs_of(RECIPE, **self.settings)),
            fold_ratio=0.3,
            durability=self.durability,
            disk=self.disk,
        )

    @property
    def both(self) -> Pair:
        assert self.pair is not None
        return self.pair

    @rule(shape=SHAPES, ahead=st.integers(0, 3))
    def announce(self, shape: tuple[int, int], ahead: int) -> None:
        if len(self.windows) < OPEN_WINDOWS:
            tokens = random_tokens(self.both.rng, shape)
            self.windows.append(self.both.announce(tokens, self.both.step + ahead))

    @precondition(lambda self: self.windows)
    @rule(pick=st.integers(0, OPEN_WINDOWS - 1))
    def close_a_window(self, pick: int) -> None:
        window = self.windows.pop(pick % len(self.windows))
        window.store.close()
        window.oracle.close()

    @rule(accumulate=st.integers(0, 2), shape=SHAPES, ask_for_norm=st.booleans())
    def train(self, accumulate: int, shape: tuple[int, int], ask_for_norm: bool) -> None:
        """Push everything announced for this step and `accumulate` more windows, then commit."""
        step = self.both.step
        for _ in range(accumulate):
            self.windows.append(self.both.announce(random_tokens(self.both.rng, shape), step))
        for window in self.windows:
            if window.store.step == step:
                window.push_random(self.both.rng)
                if ask_for_norm:
                    norm = self.both.session.gradient_norm()
                    np.testing.assert_allclose(norm, self.both.oracle.gradient_norm(), rtol=1e-6)
        self.both.commit()
        self.windows = [w for w in self.windows if w.store.step != step]

    @rule(times=st.integers(3, 8))
    def train_for_a_while(self, times: int) -> None:
        """Enough to seal."""
        for _ in range(times):
            self.train(2, (2, 40), False)

    @rule(shape=SHAPES)
    def evaluate(self, shape: tuple[int, int]) -> None:
        window = self.both.announce(random_tokens(self.both.rng, shape))
        for layer in window.layers:
            window.rows(layer)
        window.store.close()

    @rule()
    def snapshot(self) -> None:
        ref = self.both.snapshot()
        assert self.refs.setdefault(ref.step, ref) == ref

    @rule(pick=st.integers(0, 9))
    def restore(self, pick: int) -> None:
        steps = [0, *sorted(self.refs)]
        step = steps[pick % len(steps)]
        self.both.session.restore(self.refs.get(step, step))
        self.both.oracle.restore(step)
        self.refs = {known: ref for known, ref in self.refs.items() if known <= step}
        self.windows = []

    @rule()
    def fold(self) -> None:
        self.both.store.fold()

    @rule()
    def close_and_open(self) -> None:
        self.both.store.close()
        # Closing keeps a snapshot of the current step; the oracle keeps it in mind.
        self.both.oracle.snapshot()
        for window in self.windows:
            window.oracle.close()
        self.windows = []
        self.both.session = self.open()

    def die(self) -> None:
        """What a killed process leaves: no seal, no snapshot, memtables as they are.

        Kills in the middle of something are in tests/crash.
        """
        engine = self.both.store._engine
        assert isinstance(engine, Engine)
        engine._let_go()
        engine._close_memtables()
        engine._lock.release()
        for window in self.windows:
            window.oracle.close()
        self.windows = []

    def come_back(self, kind: RecoveryKind) -> None:
        self.both.session = self.open()
        assert self.both.store.recovery is not None
        assert self.both.store.recovery.kind is kind
        # What is taken over becomes a snapshot; after going back there is one already.
        self.both.oracle.snapshot()

    @rule()
    def kill(self) -> None:
        self.die()
        self.come_back(RecoveryKind.RECOVERED)

    @rule()
    def lose_the_host(self) -> None:
        """Shared memory is gone: the newest snapshot, or every step where they are journaled."""
        self.die()
        shutil.rmtree(memtable_directory(self.path, self.store_id))
        if self.durability == "step":
            self.come_back(RecoveryKind.REPLAYED)
            return
        newest = max(self.both.oracle._snapshots)
        self.both.oracle.restore(newest)
        self.refs = {known: ref for known, ref in self.refs.items() if known <= newest}
        self.come_back(RecoveryKind.ROLLED_BACK)

    @rule()
    def commit_out_of_order(self) -> None:
        """A step again, and one too early: refused with the number that is expected."""
        step = self.both.step
        with pytest.raises(StepGapError, match=str(step)):
            self.both.session.commit(step + 1, 0.1)
        if step:
            with pytest.raises(DuplicateStepError, match=str(step)):
                self.both.session.commit(step - 1, 0.1)

    @rule(at=st.integers(1, 12))
    def snapshot_on_a_full_disk(self, at: int) -> None:
        """It is there as a whole, or not at all; training goes on when there is space."""
        before = self.both.store.snapshots()
        self.disk.fail(errno.ENOSPC, at, forever=True)
        try:
            ref = self.both.session.snapshot()
        except DiskFullError:
            assert self.both.store.snapshots() == before
        else:
            self.both.oracle.snapshot()
            assert self.refs.setdefault(ref.step, ref) == ref
        finally:
            self.disk.heal()

    @rule(pick=st.integers(0, 9))
    def read_a_snapshot(self, pick: int) -> None:
        steps = [0, *sorted(self.refs)]
        step = steps[pick % len(steps)]
        with engram_store.open(self.path, snapshot=step) as reader:
            past: MemorySession = make_oracle(RECIPE, None, **self.settings)
            past.contents = self.both.oracle._snapshots[step][1]
            assert_same_tables(reader, past)

    @invariant()
    def every_row_and_state_is_the_oracles(self) -> None:
        if self.pair is not None:
            self.pair.check()

    def teardown(self) -> None:
        if self.pair is not None:
            self.pair.store.close()
            directory = memtable_directory(self.path, self.store_id)
            shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(self.directory)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=20)
