"""Checkpoints of a Trainer with a memory: resumed runs are the uninterrupted ones, bit for bit."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from engram_store import snapshots
from engram_store.errors import ConfigError, SnapshotMismatchError, StoreNotFoundError
from engram_store.store import Store
from engram_store_client import Memory
from tests.unit.trainer_runs import (
    Stream,
    Texts,
    arguments,
    attached,
    make_store,
    make_trainer,
    series,
    tables_of,
    weights_of,
)

STEPS, EVERY = 7, 2


class Power(TrainerCallback):
    """Goes out after a step."""

    def __init__(self, after: int) -> None:
        self._after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._after:
            raise KeyboardInterrupt


def run_arguments(directory: Path, **changes: Any) -> TrainingArguments:
    """Epochs of 11 texts: 6 batches, 3 steps; a checkpoint every 2 steps, within and between."""
    return arguments(
        directory,
        **{
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "max_grad_norm": 0.3,
            "save_strategy": "steps",
            "save_steps": EVERY,
        }
        | changes,
    )


def texts() -> Texts:
    return Texts(11, lengths=(4, 12))


Result = tuple[dict[int, bytes], dict[str, Tensor], list[float], list[float]]


def result_of(store: Store, trainer: Trainer) -> Result:
    assert isinstance(trainer.model, torch.nn.Module)
    return (
        tables_of(store),
        weights_of(trainer.model),
        series(trainer, "loss"),
        series(trainer, "grad_norm"),
    )


def assert_same(ours: Result, theirs: Result) -> None:
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(tensor, theirs[1][name]) for name, tensor in ours[1].items())
    assert ours[2:] == theirs[2:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What a run without interruption ends with."""
    path = tmp_path_factory.mktemp("whole")
    with make_store(path / "a.engram", "adam") as store:
        trainer = make_trainer(
            attached(store, mode="full"), run_arguments(path / "run"), train_dataset=texts()
        )
        trainer.train()
        return result_of(store, trainer)


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Store]:
    with make_store(tmp_path / "a.engram", "adam") as store:
        yield store


def interrupted(memory: Memory, args: TrainingArguments, after: int, **changes: Any) -> None:
    """A run that is killed after a step, with the next windows announced."""
    trainer = make_trainer(
        memory, args, train_dataset=texts(), more_callbacks=[Power(after)], **changes
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    memory.finish_commit()


@pytest.mark.parametrize("after", [5, 7])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, stores: Store, uninterrupted: Result, after: int
) -> None:
    """Tables' bytes, gates, dense weights, losses and norms; from within and between epochs."""
    args = run_arguments(tmp_path / "run")
    memory = attached(stores, mode="full")
    interrupted(memory, args, after)
    memory.detach()
    memory = attached(stores, mode="full")
    assert memory.step == after

    trainer = make_trainer(memory, args, train_dataset=texts())
    trainer.train(resume_from_checkpoint=True)

    assert_same(result_of(stores, trainer), uninterrupted)
    assert sum(series(trainer, "engram/announced_again")) == 0


def test_a_run_in_the_same_process_and_model_can_be_resumed(
    tmp_path: Path, stores: Store, uninterrupted: Result
) -> None:
    """Windows and helpers of the broken run are gone; nothing is left in the model."""
    args = run_arguments(tmp_path / "run")
    memory = attached(stores, mode="full")
    interrupted(memory, args, 3)

    trainer = make_trainer(memory, args, train_dataset=texts())
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

    assert_same(result_of(stores, trainer), uninterrupted)
    assert not any("clipping" in name for name, _ in memory.model.named_modules())
    assert memory.reader.windows._ahead == {}


def test_a_stream_that_is_skipped_forward_trains_the_same(tmp_path: Path, stores: Store) -> None:
    """Batches that are made only to be skipped are announced for steps that are not theirs."""
    with make_store(tmp_path / "b.engram", "adam") as other:
        whole = make_trainer(
            attached(other, mode="full"),
            run_arguments(tmp_path / "whole"),
            train_dataset=Stream(Texts(40)),
        )
        whole.train()
        expected = result_of(other, whole)
    args = run_arguments(tmp_path / "run")
    stream = Stream(Texts(40))
    memory = attached(stores, mode="full")
    trainer = make_trainer(memory, args, train_dataset=stream, more_callbacks=[Power(5)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()

    trainer = make_trainer(memory, args, train_dataset=stream)
    trainer.train(resume_from_checkpoint=True)

    assert_same(result_of(stores, trainer), expected)
    # The log from before the interruption is part of it: four steps without one mistaken guess.
    assert series(trainer, "engram/announced_again") == [0.0] * 4 + [1.0] + [0.0] * 2


def test_deleted_checkpoints_take_their_pins_along(tmp_path: Path, stores: Store) -> None:
    """With `save_total_limit` the pinned snapshots are those of the checkpoints that are there."""
    args = run_arguments(tmp_path / "run", save_total_limit=2)
    memory = attached(stores, mode="full")
    make_trainer(memory, args, train_dataset=texts()).train()

    kept = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    pins = {pin: info.step for info in snapshots.describe(stores.path) for pin in info.pins}
    assert kept == ["checkpoint-6", "checkpoint-7"]
    assert sorted(pins.values()) == [6, 7]
    assert {p.name for p in (tmp_path / "run" / "checkpoint-6" / "engram").iterdir()} >= {
        "engram_config.json",
        "engram_dense.safetensors",
    }
    stores.collect_garbage(keep=1)
    assert stores.snapshots() == [6, 7]

    trainer = make_trainer(memory, args, train_dataset=texts())
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert memory.step == 7


def test_the_best_checkpoint_brings_its_tables_back(tmp_path: Path, stores: Store) -> None:
    """`load_best_model_at_end`: tables and gates are those of that checkpoint."""
    saved: dict[int, dict[int, bytes]] = {}

    class Notes(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            saved[state.global_step] = tables_of(stores)

    class Fake(TrainerCallback):
        """The first checkpoint is the best one."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            more["metrics"]["eval_loss"] = float(state.global_step)

    args = run_arguments(
        tmp_path / "run",
        eval_strategy="steps",
        eval_steps=EVERY,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        save_total_limit=1,
    )
    memory = attached(stores, mode="full")
    trainer = make_trainer(
        memory,
        args,
        train_dataset=texts(),
        eval_dataset=Texts(5, seed=9),
        more_callbacks=[Notes(), Fake()],
    )
    trainer.train()

    assert trainer.state.best_model_checkpoint is not None
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert tables_of(stores) == saved[2] != saved[6]
    assert memory.step == 2


def test_what_cannot_be_resumed_is_refused_before_anything_is_changed(
    tmp_path: Path, stores: Store
) -> None:
    """No tables in the checkpoint, another store's, a snapshot that is gone, nobody knows which."""
    args = run_arguments(tmp_path / "run")
    memory = attached(stores, mode="full")
    interrupted(memory, args, 3)
    kept = tmp_path / "run" / "checkpoint-2"
    before = tables_of(stores), memory.step

    def refused(error: type[Exception], match: str, memory: Memory, **changes: Any) -> None:
        where = changes.pop("resume", str(kept))
        trainer = make_trainer(memory, changes.pop("args", args), train_dataset=texts(), **changes)
        with pytest.raises(error, match=match):
            trainer.train(resume_from_checkpoint=where)
        assert not any("clipping" in name for name, _ in memory.model.named_modules())

    moved = shutil.copytree(kept, tmp_path / "elsewhere" / "moved")
    refused(
        ConfigError, "resume_from=", memory, args=run_arguments(tmp_path / "new"), resume=str(moved)
    )
    shutil.move(kept / "engram", tmp_path / "hidden")
    refused(StoreNotFoundError, "was saved without memory 'default'", memory)
    shutil.move(tmp_path / "hidden", kept / "engram")
    assert (tables_of(stores), memory.step) == before
    with make_store(tmp_path / "b.engram", "adam") as other:
        refused(SnapshotMismatchError, "belongs to store", attached(other, mode="full"))
        assert other.step == 0

    for info in snapshots.describe(stores.path):
        for name in info.pins:
            snapshots.unpin(stores.path, name)
    stores.snapshot()
    stores.collect_garbage(keep=1)
    refused(SnapshotMismatchError, "2", memory)
    assert (tables_of(stores), memory.step) == before


def test_a_checkpoint_elsewhere_is_resumed_if_the_callback_is_told(
    tmp_path: Path, stores: Store, uninterrupted: Result
) -> None:
    """Another output directory, without a copy of the checkpoint."""
    memory = attached(stores, mode="full")
    interrupted(memory, run_arguments(tmp_path / "run"), 3)
    kept = tmp_path / "run" / "checkpoint-2"

    trainer = make_trainer(
        memory,
        run_arguments(tmp_path / "new"),
        train_dataset=texts(),
        callbacks=[memory.callback(resume_from=kept)],
    )
    trainer.train(resume_from_checkpoint=str(kept))

    assert_same(result_of(stores, trainer), uninterrupted)
