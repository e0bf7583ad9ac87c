"""The lines of `bench train`: one model each, and rows from different places.

Needs torch and the client. Every line does the same dense work; `step` is one whole training step.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from engram_store.bench.train_model import TinyModel
from engram_store.bench.train_place import HIDDEN, LEARNING_RATE, Looked, TrainPlace
from engram_store.bench.workplace import LAYER, STD
from engram_store.session import Session
from engram_store.types import RowBlock
from engram_store_client import GateConfig, GateKind, Memory, attach, build_gate
from engram_store_client.memory import SUBMODULE

_DENSE_RATE = 1e-3
_FILL_ROWS = 1 << 14


class RowSource(Protocol):
    """Where a line without a store has its rows from."""

    def rows(self, looked: Looked) -> Tensor:
        """Rows of all heads side by side: float32 [batch, time, columns * dim]."""
        ...

    def step(self) -> None:
        """Train them, after the backward pass."""
        ...


class ConstantRows:
    """Unique rows that are there already: no table, so nothing is hashed, read or updated.

    Args:
        place: what is looked up.
        gradients: whether the backward pass reaches the rows, as it does where they are trained.
    """

    def __init__(self, place: TrainPlace, *, gradients: bool) -> None:
        self._gradients = gradients
        self._rows = STD * torch.randn(place.most_rows, place.dim)

    def rows(self, looked: Looked) -> Tensor:
        """See `RowSource`; expanded as the client does it."""
        leaf = self._rows[: looked.rows.size].detach().requires_grad_(self._gradients)
        return F.embedding(torch.from_numpy(looked.inverse), leaf).flatten(-2)

    def step(self) -> None:
        """They stay as they are."""


class EmbeddedRows:
    """The table as a sparse parameter in memory: `nn.Embedding` and `SparseAdam`, in float32.

    It is given row ids, so it need not hash.

    Args:
        place: what is looked up.
        rows: of the table.
    """

    def __init__(self, place: TrainPlace, rows: int) -> None:
        weights = torch.empty(rows, place.dim)
        fill = STD * torch.randn(_FILL_ROWS, place.dim)
        for first in range(0, rows, _FILL_ROWS):
            part = weights[first : first + _FILL_ROWS]
            part.copy_(fill[: len(part)])
        self._table = nn.Embedding(rows, place.dim, sparse=True, _weight=weights)
        self._optimizer = torch.optim.SparseAdam(self._table.parameters(), lr=LEARNING_RATE)
        self._ids = {
            id(looked): torch.from_numpy(looked.rows.astype(np.int64)[looked.inverse])
            for looked in place.looked
        }
        self._make_moments()
        self._first = torch.from_numpy(place.looked[0].rows.astype(np.int64))
        self._before = self._table.weight.detach()[self._first].clone()

    def _make_moments(self) -> None:
        """Memory of the moments is there before a step is timed."""
        weight = self._table.weight
        self._optimizer.state[weight] = {
            "step": 0,
            "exp_avg": torch.empty_like(weight).fill_(0),
            "exp_avg_sq": torch.empty_like(weight).fill_(0),
        }

    def rows(self, looked: Looked) -> Tensor:
        """See `RowSource`."""
        found: Tensor = self._table(self._ids[id(looked)])
        return found.flatten(-2)

    def step(self) -> None:
        """One step of SparseAdam."""
        self._optimizer.step()  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad()

    def changed(self) -> float:
        """Share of the rows of the first step that training has changed."""
        now = self._table.weight.detach()[self._first]
        return float((now != self._before).any(dim=1).float().mean())


class LocalLine:
    """A line whose rows come from this process, without a store."""

    def __init__(self, place: TrainPlace, source: RowSource) -> None:
        self._source, self._steps = source, place.endlessly()
        self._model = TinyModel(place)
        config = GateConfig(
            kind=GateKind.ENGRAM,
            hidden_size=HIDDEN,
            row_width=place.recipe.columns * place.dim,
            dilation=place.recipe.max_order,
        )
        self._gate = build_gate(config)
        self._model.add_module(SUBMODULE, self._gate)
        self._model.backbone.layers[LAYER].register_forward_pre_hook(self._add_memory)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=_DENSE_RATE)
        self._looked: Looked | None = None

    def _add_memory(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the client's hook does with rows of the store."""
        assert self._looked is not None
        return (args[0] + self._gate(self._source.rows(self._looked), args[0]), *args[1:])

    def step(self) -> float:
        """One training step; returns the loss."""
        self._looked = next(self._steps)
        loss = self._model(input_ids=torch.from_numpy(self._looked.tokens))
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._source.step()
        return float(loss.item())


class StoreLine:
    """A line whose rows come from a store, by the client as a trainer uses it.

    Args:
        place: what is trained.
        session: the store, embedded or a process.
        depth: windows announced ahead.
        wait: whether a step waits for its commit to be done.
    """

    def __init__(
        self, place: TrainPlace, session: Session, *, depth: int, wait: bool = True
    ) -> None:
        self._first = place.looked[0]
        self._session, self._wait = session, wait
        self._before = self._rows_of_first()
        self._model = TinyModel(place)
        self._memory: Memory = attach(self._model, session, mode="full", hidden_size=HIDDEN)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=_DENSE_RATE)
        batches = ({"input_ids": torch.from_numpy(step.tokens)} for step in place.endlessly())
        self._batches: Iterator[Any] = iter(self._memory.look_ahead(batches, depth))

    def step(self) -> float:
        """One training step; returns the loss."""
        loss = self._model(**next(self._batches))
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._memory.commit(self._memory.step, LEARNING_RATE, wait=self._wait)
        return float(loss.item())

    def changed(self) -> float:
        """Share of the rows of the first step that training has changed."""
        return float((self._rows_of_first() != self._before).any(axis=1).mean())

    def _rows_of_first(self) -> RowBlock:
        with self._session.announce(self._first.tokens) as window:
            return window.rows(LAYER)[0].copy()

    def close(self) -> None:
        """Give the windows announced ahead back; the session stays open."""
        self._memory.finish_commit()
        self._memory.detach()


def read_all(session: Session, place: TrainPlace) -> None:
    """Look at every row that is going to be trained: a page fault each, once per process."""
    for looked in place.looked:
        with session.announce(looked.tokens) as window:
            window.rows(LAYER)
