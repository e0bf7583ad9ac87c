"""Gives a Hugging Face causal language model a memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from engram_store.errors import ConfigError, UnknownLayerError
from engram_store.session import Session
from engram_store_client.gates import Gate, GateConfig, GateKind, build_gate
from engram_store_client.memory import SUBMODULE, Memory
from engram_store_client.structure import Decoder, find_decoder


def attach(
    model: nn.Module,
    session: Session,
    *,
    layers: Sequence[int] | None = None,
    gate: GateKind | str | None = None,
    train_base: bool = False,
    zero_table: bool = False,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Memory:
    """Let decoder layers of a model look up rows of a store, by hooks; its code stays as it is.

    Before each of the layers runs, its gate's output is added to the hidden states.

    Args:
        model: a causal language model of Hugging Face's kind, or a wrapper around one.
        session: the store.
        layers: model layers, counted from zero; None: every layer the store has a table for.
            The tables of other layers are neither read nor changed.
        gate: which published module; None: the one that was published with the store's recipe.
        train_base: False freezes the model's own parameters until `Memory.detach`.
        zero_table: the control arm: rows are replaced by zeros and tables are never changed.
            What it learns, the gates learn without a memory.
        dtype: of the gates and of the rows they see; None: the decoder layer's.
        options: further fields of `GateConfig`, such as `bias` or `identity_init`.

    Raises:
        ConfigError: no decoder layers, no such layer, an unknown option, or attached already.
        UnknownLayerError: the store has no table for a layer.
    """
    if any(name.rpartition(".")[2] == SUBMODULE for name, _ in model.named_modules()):
        raise ConfigError("the model has a memory already; call its detach() first")
    decoder = find_decoder(model)
    chosen = tuple(sorted(session.tables)) if layers is None else tuple(layers)
    for number in chosen:
        if number not in session.tables:
            raise UnknownLayerError(number, sorted(session.tables))
    kind = _kind(session.recipe.family if gate is None else gate)
    gates = {
        number: _gate(decoder, session, number, kind, dtype=dtype, options=options)
        for number in chosen
    }
    memory = Memory(model, decoder, session, gates, zero_table=zero_table)
    if not train_base:
        memory.freeze_base()
    return memory


def _kind(name: str) -> GateKind:
    try:
        return GateKind(str(name))
    except ValueError:
        known = ", ".join(GateKind)
        raise ConfigError(f"unknown gate {name!r}; there are {known}") from None


def _gate(
    decoder: Decoder,
    session: Session,
    number: int,
    kind: GateKind,
    *,
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> Gate:
    """One layer's gate, on that layer's device."""
    like = next(decoder.layer(number).parameters())
    recipe = session.recipe
    fields = {
        "hidden_size": decoder.hidden_size(),
        "row_width": recipe.columns * session.tables[number].dim,
        "dilation": recipe.max_order,
        **options,
    }
    if fields["hidden_size"] is None:
        raise ConfigError("the model's config names no hidden_size; pass hidden_size=...")
    try:
        config = GateConfig(kind=kind, **fields)
    except TypeError as error:
        known = ", ".join(GateConfig.__dataclass_fields__)
        raise ConfigError(f"{error}; gates have the options {known}") from error
    return build_gate(config).to(like.device, dtype or like.dtype)
