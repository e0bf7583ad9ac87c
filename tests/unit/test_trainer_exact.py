"""A Trainer with a memory trains what it trains with the same tables in its optimiser."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, get_linear_schedule_with_warmup

from engram_store_client import Memory
from tests.unit.client.tiny import LAYERS, llama
from tests.unit.trainer_runs import (
    InMemory,
    Texts,
    arguments,
    attached,
    make_store,
    make_trainer,
    pad,
    rows_of,
    series,
    weights_of,
)

RTOL, ATOL = 2e-5, 2e-6
"""Sums are taken in another order: fp32 rounding, grown over the steps."""
FACTOR, DECAY = 5.0, 0.1


def sgd(dense: list[nn.Parameter], tables: list[nn.Parameter], rate: float) -> torch.optim.SGD:
    """Plain SGD, dense with weight decay, tables with a higher rate and none."""
    groups: list[dict[str, Any]] = [{"params": dense, "weight_decay": DECAY}]
    if tables:
        groups.append({"params": tables, "lr": rate * FACTOR, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=rate)


def optimizers(
    dense: list[nn.Parameter], tables: list[nn.Parameter]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """And a schedule that begins at a rate of zero."""
    optimizer = sgd(dense, tables, 0.2)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 9)  # type: ignore[no-untyped-call]
    return optimizer, schedule


CASES: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.05, "max_steps": 5},
    "unclipped": {"max_grad_norm": 0.0, "max_steps": 5},
    # 7 batches by 3: each epoch ends with a shorter step; all lengths differ.
    "accumulated": {
        "max_grad_norm": 0.4,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
        "activation_checkpointing": True,
    },
    "bf16": {"max_grad_norm": 0.4, "bf16": True, "max_steps": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_norms_weights_and_tables_equal_those_of_embeddings(
    tmp_path: Path, case: str
) -> None:
    """With clipping by one coefficient, accumulation, a schedule, decay, and mixed precision."""
    args = arguments(tmp_path / "run", **CASES[case])
    texts = Texts(14, lengths=(4, 12))
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store, mode="full")
        initial = {n: rows_of(store, n).copy() for n in LAYERS}
        other = in_memory(memory, initial)
        trainer = make_trainer(
            memory, args, train_dataset=texts, optimizers=optimizers(dense_of(memory), [])
        )
        trainer.train()
        final = {n: rows_of(store, n).copy() for n in LAYERS}

    tables = list(other.tables.parameters())
    known = {id(p) for p in tables}
    dense = [p for p in other.parameters() if id(p) not in known]
    same = {k: v for k, v in CASES[case].items() if k != "activation_checkpointing"}
    reference = Trainer(
        model=other,
        args=arguments(tmp_path / "other", **same),
        train_dataset=texts,
        data_collator=pad,
        optimizers=optimizers(dense, tables),
    )
    reference.train()

    for key in ("loss", "grad_norm", "learning_rate"):
        ours, theirs = series(trainer, key), series(reference, key)
        assert len(ours) == len(theirs) > 2
        np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=ATOL, err_msg=key)
    weights = weights_of(other)
    for name, tensor in memory.model.state_dict().items():
        torch.testing.assert_close(tensor, weights[other_name(name)], rtol=RTOL, atol=ATOL)
    for number in LAYERS:
        expected = weights[f"tables.{number}.weight"].numpy()
        np.testing.assert_allclose(final[number], expected, rtol=RTOL, atol=ATOL)
        assert np.abs(final[number] - initial[number]).max() > 100 * ATOL
    assert series(trainer, "engram/announced_again") == [0.0] * len(series(trainer, "loss"))


def in_memory(memory: Memory, rows: dict[int, Any]) -> InMemory:
    """A copy of the memory's model and gates, with these rows."""
    model = llama()
    own = {k: v for k, v in memory.model.state_dict().items() if not k.startswith("engram_")}
    model.load_state_dict(own)
    gates = {number: copy.deepcopy(gate) for number, gate in memory.reader.gates.items()}
    return InMemory(model, gates, rows)


def dense_of(memory: Memory) -> list[nn.Parameter]:
    return [p for p in memory.model.parameters() if p.requires_grad]


def other_name(name: str) -> str:
    """Of a weight of the attached model, in `InMemory`."""
    prefix = "engram_memory.default."
    if name.startswith(prefix):
        return "gates." + name.removeprefix(prefix)
    return f"model.{name}"
