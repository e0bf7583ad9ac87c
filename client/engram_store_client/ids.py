"""What a call of a model tells about its tokens, at whichever of its modules it came in."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engram_store.errors import InputError
from engram_store.types import TokenIds

TICKET = "engram_window"
"""Key of a batch that names its window for the memory called "default"; removed before the model
sees it."""
DEFAULT_NAME = "default"


def ticket_key(name: str) -> str:
    """Key of a batch that names its window for the memory called `name`."""
    return TICKET if name == DEFAULT_NAME else f"{TICKET}_{name}"


@dataclass(frozen=True, slots=True)
class Call:
    """One forward pass, as the memories see it."""

    input_ids: Tensor
    """[B, T]"""
    padding: Tensor | None
    """[B, T], 0 at padding."""
    cache: Any
    """The KV cache that the backbone was given, if any."""
    tickets: Mapping[str, int]
    """By key of the batch: see `Entries.take_tickets`."""


@dataclass(slots=True)
class Entry:
    """A module that was entered and not left yet, with what its call said."""

    module: nn.Module
    arguments: Mapping[str, Any]
    tickets: dict[str, int]


class Entries:
    """The modules that a call went through on its way to the backbone.

    A multimodal model is called with token ids, but calls its language model with embeddings; a
    wrapper may call the model several times. So the innermost call that has ids is asked.
    """

    def __init__(self) -> None:
        self._entered: list[Entry] = []
        self._parameters: dict[nn.Module, list[str]] = {}

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Remember a call; returns its keyword arguments without tickets."""
        self.leave(module)  # left behind by a call that failed
        names = self._parameters.get(module)
        if names is None:
            names = self._parameters[module] = list(inspect.signature(module.forward).parameters)
        tickets = {k: int(v) for k, v in kwargs.items() if k.startswith(TICKET) and v is not None}
        others = {k: v for k, v in kwargs.items() if not k.startswith(TICKET)}
        named = dict(zip(names, args, strict=False)) | others
        self._entered.append(Entry(module, named, tickets))
        return others

    def leave(self, module: nn.Module) -> None:
        """Forget a call and those inside of it."""
        for depth, entry in enumerate(self._entered):
            if entry.module is module:
                del self._entered[depth:]
                return

    def take_tickets(self) -> dict[str, int]:
        """The tickets that came along, by key of the batch; once."""
        tickets = dict[str, int]()
        for entry in self._entered:
            tickets |= entry.tickets
            entry.tickets = {}
        return tickets

    def call(self, tickets: Mapping[str, int]) -> Call:
        """What the modules that are entered now say.

        Raises:
            InputError: none of them was given token ids.
        """
        inward = [entry.arguments for entry in reversed(self._entered)]
        ids = next((a["input_ids"] for a in inward if a.get("input_ids") is not None), None)
        if not isinstance(ids, Tensor):
            raise InputError(
                "Engram rows are looked up by token id: call the model with input_ids "
                "(inputs_embeds alone do not tell which rows to read)"
            )
        masks = (a.get("attention_mask") for a in inward)
        mask = next((m for m in masks if isinstance(m, Tensor) and m.ndim == 2), None)
        # A mask covers what is in the cache too.
        padding = None if mask is None else mask[:, -ids.shape[1] :]
        return Call(ids, padding, inward[0].get("past_key_values"), tickets)


def host_ids(ids: Any) -> TokenIds:
    """Token ids or a mask [batch, time] as int64 numpy; waits for the device they are on."""
    array: TokenIds = torch.as_tensor(ids).detach().cpu().to(torch.int64).numpy()
    return array
