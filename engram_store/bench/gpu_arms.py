"""The arms of `bench train --device cuda`: one base model, and rows from different places.

Needs torch, transformers and the client. Every arm trains gates of its own and its rows; the base
stays as it is. `step` is one whole training step.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from engram_store.bench.gpu_place import LEARNING_RATE, BaseSize, GpuPlace, LookedUp
from engram_store.bench.workplace import STD
from engram_store.session import Session
from engram_store.types import RowBlock
from engram_store_client import GateConfig, Memory, attach, build_gate
from engram_store_client.structure import find_decoder

_DENSE_RATE = 1e-4
_FILL_ROWS = 1 << 16


def build_base(size: BaseSize, device: torch.device, *, checkpointing: bool) -> nn.Module:
    """A random Qwen3 in bfloat16, frozen; made on the device, so that it is nowhere twice."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=size.hidden,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        intermediate_size=size.mlp,
        vocab_size=size.vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    if checkpointing:
        # transformers 5.23 has another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    base: nn.Module = model.train()
    return base


class RowSource(Protocol):
    """Where an arm without a store has its rows from."""

    def rows(self, layer: int, looked: LookedUp) -> Tensor:
        """Unique rows [n, dim] on the device, a leaf of autograd."""
        ...

    def step(self) -> None:
        """Train them, after the backward pass."""
        ...


class ConstantRows:
    """Unique rows that are on the device already: nothing is hashed, copied, read or updated."""

    def __init__(self, place: GpuPlace, layers: tuple[int, ...], device: torch.device) -> None:
        self._rows = {
            layer: (STD * torch.randn(place.most_rows(layer), place.dim, device=device)).bfloat16()
            for layer in layers
        }

    def rows(self, layer: int, looked: LookedUp) -> Tensor:
        """See `RowSource`; the gradient is computed and dropped."""
        unique, _ = looked.found[layer]
        return self._rows[layer][: unique.size].detach().requires_grad_()

    def step(self) -> None:
        """They stay as they are."""


class DeviceTables:
    """Whole tables in the device's memory, in bfloat16, with row-wise Adagrad.

    Row ids are given, so nothing is hashed; rounding is to nearest.
    """

    def __init__(self, place: GpuPlace, rows: dict[int, int], device: torch.device) -> None:
        self._device = device
        self._tables: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        fill = STD * torch.randn(_FILL_ROWS, place.dim, device=device)
        for layer, count in rows.items():
            table = torch.empty(count, place.dim, dtype=torch.bfloat16, device=device)
            for first in range(0, count, _FILL_ROWS):
                part = table[first : first + _FILL_ROWS]
                part.copy_(fill[: len(part)])
            self._tables[layer] = table
            self._sums[layer] = torch.zeros(count, device=device)
        self._ids = {
            (id(step), layer): torch.from_numpy(unique.astype(np.int64)).to(device)
            for step in place.steps
            for layer, (unique, _) in step.found.items()
        }
        self._read: list[tuple[int, Tensor, Tensor]] = []

    def rows(self, layer: int, looked: LookedUp) -> Tensor:
        """See `RowSource`."""
        ids = self._ids[id(looked), layer]
        leaf = self._tables[layer][ids].requires_grad_()
        self._read.append((layer, ids, leaf))
        return leaf

    @torch.no_grad()
    def step(self) -> None:
        """One step of row-wise Adagrad on the rows that were read."""
        for layer, ids, leaf in self._read:
            if leaf.grad is None:
                continue
            gradient = leaf.grad.float()
            sums = self._sums[layer][ids] + gradient.square().mean(dim=1)
            self._sums[layer][ids] = sums
            change = LEARNING_RATE * gradient / (sums.sqrt()[:, None] + 1e-10)
            self._tables[layer][ids] = (leaf.float() - change).bfloat16()
        self._read = []


class LocalArm:
    """An arm without a store: the same gates at the same blocks, rows from this process."""

    def __init__(
        self, model: nn.Module, place: GpuPlace, source: RowSource, configs: dict[int, GateConfig]
    ) -> None:
        self._model, self._source = model, source
        self._device = next(model.parameters()).device
        torch.manual_seed(1)
        self._gates = {
            layer: build_gate(config).to(self._device, torch.bfloat16)
            for layer, config in configs.items()
        }
        decoder = find_decoder(model)
        self._hooks = [
            decoder.layer(layer).register_forward_pre_hook(self._adding(layer), with_kwargs=True)
            for layer in configs
        ]
        self._optimizer = _optimizer(self._gates.values())
        self._inverse = {
            (id(step), layer): torch.from_numpy(inverse).to(self._device)
            for step in place.steps
            for layer, (_, inverse) in step.found.items()
        }
        self._steps = place.endlessly()
        self._looked: LookedUp | None = None
        self._leaves: dict[int, Tensor] = {}

    def _adding(self, layer: int) -> Any:
        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            assert self._looked is not None
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer not in self._leaves:  # checkpointing runs the block again
                self._leaves[layer] = self._source.rows(layer, self._looked)
            places = self._inverse[id(self._looked), layer]
            found = F.embedding(places, self._leaves[layer]).flatten(-2)
            total = hidden + self._gates[layer](found, hidden)
            return (
                ((total, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": total})
            )

        return add

    def step(self) -> float:
        """One training step; returns the loss, which the host waits for."""
        self._looked, self._leaves = next(self._steps), {}
        tokens = torch.from_numpy(self._looked.tokens).to(self._device)
        loss = self._model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._source.step()
        return float(loss.item())

    def close(self) -> None:
        """Make the model what it was."""
        for hook in self._hooks:
            hook.remove()


class StoreArm:
    """An arm whose rows come from a store, by the client as a trainer uses it.

    Token ids stay on the host until they are announced, as a collator has them.

    Args:
        model: the base.
        place: what is trained.
        session: the store.
        depth: windows announced ahead.
        wait: whether a step waits for its commit to be done.
    """

    def __init__(
        self, model: nn.Module, place: GpuPlace, session: Session, *, depth: int, wait: bool
    ) -> None:
        self._model, self._session, self._wait = model, session, wait
        self._first = place.steps[0]
        self._before = self._rows_of_first()
        self._device = next(model.parameters()).device
        torch.manual_seed(1)
        self.memory: Memory = attach(model, session)
        self._optimizer = _optimizer(self.memory.gates.values())
        batches = ({"input_ids": torch.from_numpy(step.tokens)} for step in place.endlessly())
        self._batches: Iterator[Any] = iter(self.memory.look_ahead(batches, depth))

    def step(self) -> float:
        """One training step; returns the loss, which the host waits for."""
        batch = next(self._batches)
        batch["input_ids"] = batch["input_ids"].to(self._device, non_blocking=True)
        loss = self._model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.memory.commit(self.memory.step, LEARNING_RATE, wait=self._wait)
        return float(loss.item())

    def changed(self) -> float:
        """Share of the rows of the first step that training has changed, of the first table."""
        return float((self._rows_of_first() != self._before).any(axis=1).mean())

    def _rows_of_first(self) -> RowBlock:
        layer = next(iter(self._session.tables))
        with self._session.announce(self._first.tokens) as window:
            return window.rows(layer)[0].copy()

    def close(self) -> None:
        """Make the model what it was; the session stays open."""
        self.memory.finish_commit()
        self.memory.detach()


def read_all(session: Session, place: GpuPlace) -> None:
    """Look at every row that is going to be trained: a page fault each, once per process."""
    for step in place.steps:
        with session.announce(step.tokens) as window:
            for layer in session.tables:
                window.rows(layer)


def _optimizer(gates: Any) -> torch.optim.Optimizer:
    parameters = [parameter for gate in gates for parameter in gate.parameters()]
    return torch.optim.AdamW(parameters, lr=_DENSE_RATE)
