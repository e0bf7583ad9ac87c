"""Ranks of `torchrun` share one store: what they train is what one rank would have."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import engram_store
from engram_store.recipes import engram
from engram_store.store import Store
from engram_store_client import attach, rank_options
from tests.integration.ddp_worker import (
    RANKS,
    STEPS,
    TABLE_RATE,
    part,
    prepared,
    trainer_norms,
)
from tests.integration.serving import StoreProcess
from tests.unit.client.tiny import DIM, LAYERS, VOCABULARY, llama

ROOT = Path(__file__).parents[2]


def _create(path: Path) -> None:
    recipe = engram(
        token_map=np.arange(VOCABULARY), layers=LAYERS, rows_per_head=31, heads=2, pad_id=0
    )
    engram_store.create(
        path,
        recipe,
        dim=DIM,
        dtype="bfloat16",
        optimizer="rowwise_adagrad",
        initial=engram_store.Normal(std=0.5),
    )


def _rows_of(store: Store) -> dict[int, NDArray[Any]]:
    return {
        layer: store.read_rows(layer, np.arange(spec.rows, dtype=np.int32))
        for layer, spec in store.tables.items()
    }


def _check_rows(path: Path, expected: dict[int, NDArray[Any]]) -> None:
    with engram_store.open(path, "read") as store:
        assert store.step == STEPS
        for layer, rows in _rows_of(store).items():
            np.testing.assert_array_equal(rows, expected[layer])


@dataclass(frozen=True)
class Run:
    """What a run of all ranks left behind."""

    stores: Path
    """Where `loop.engram` and `trainer.engram` are."""
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    results = tmp_path_factory.mktemp("ddp")
    processes = []
    try:
        for name in ("loop", "trainer"):
            _create(results / f"{name}.engram")
            processes.append(StoreProcess(results / f"{name}.engram"))
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={RANKS}", "-m", "tests.integration.ddp_worker",
                *(f"unix:{process.socket}" for process in processes), results,
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
    finally:
        for process in processes:
            process.end()
    return Run(results, [torch.load(results / f"{rank}.pt") for rank in range(RANKS)])


@pytest.mark.slow
def test_ranks_train_what_one_rank_would(run: Run, tmp_path: Path) -> None:
    """Bit for bit: tables, dense weights, and the norm that clips both."""
    alone = tmp_path / "alone.engram"
    _create(alone)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    norms = []
    with engram_store.open(alone, "train") as store:
        model = llama()
        memory = attach(model, store, mode="full")
        optimizer = prepared(model, memory)
        for step in range(STEPS):
            for rank in range(RANKS):
                tokens = part(step, rank)
                (model(tokens, labels=tokens).loss / RANKS).backward()
            norms.append(float(memory.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
            memory.commit(step, lr=TABLE_RATE)
        rows = _rows_of(store)
    torch.set_num_threads(threads)

    _check_rows(run.stores / "loop.engram", rows)
    for rank_run in run.ranks:
        assert rank_run["norms"] == norms
        for name, value in model.state_dict().items():
            torch.testing.assert_close(rank_run["dense"][name], value, rtol=0, atol=0)


@pytest.mark.slow
def test_a_trainer_of_two_ranks_trains_what_one_does(run: Run, tmp_path: Path) -> None:
    """One rank takes the other's batches by accumulation; the bits are the same.

    The ranks' second half is one that was resumed from a checkpoint.
    """
    alone = tmp_path / "alone.engram"
    _create(alone)
    with engram_store.open(alone, "train") as store:
        norms = trainer_norms(store, tmp_path / "run", world_size=1)
        rows = _rows_of(store)
    _check_rows(run.stores / "trainer.engram", rows)
    for rank_run in run.ranks[:1]:  # the others log nothing
        assert rank_run["trainer"] == rank_run["resumed"] == norms


@pytest.mark.slow
def test_rows_never_go_through_the_buckets_of_ddp(run: Run) -> None:
    """What ranks exchange is the dense gradients, whatever the tables' size."""
    for rank_run in run.ranks:
        assert rank_run["sent"] == STEPS * rank_run["trained"]


def test_without_a_process_group_a_session_is_an_ordinary_one() -> None:
    assert rank_options() == {}
