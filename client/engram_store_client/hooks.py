"""Runs the gates inside a model's forward pass, by hooks alone.

A hook on the backbone finds the window of a forward pass: the one of its ticket, or one that is
announced on the spot. A hook before each decoder layer adds the gate's output to the hidden
states, so the layer's attention sees it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engram_store.errors import InputError, ProtocolError
from engram_store.recipes import Recipe
from engram_store.types import TokenIds
from engram_store_client.decoding import DecodingState, DecodingStates
from engram_store_client.gates import ConvCarry, Gate
from engram_store_client.rows import WindowRows
from engram_store_client.structure import Decoder
from engram_store_client.windows import OpenWindows

TICKET = "engram_window"
"""Key of a batch that names its window; removed before the model sees it."""

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class _Pass:
    """One forward pass of the backbone."""

    rows: WindowRows
    mask: Tensor | None
    """[B, T], 0 where gates stay shut."""
    decoding: "_Decoding | None" = None
    inputs: dict[int, int] = field(default_factory=dict)
    """Address of each layer's hidden states: tells this pass when a layer is run again."""


@dataclass(eq=False)
class _Decoding:
    """What a forward pass that may be continued leaves behind."""

    state: DecodingState
    tokens: TokenIds
    attention_mask: TokenIds | None
    convolutions: dict[int, ConvCarry] = field(default_factory=dict)

    def carry(self, layer: int) -> ConvCarry:
        return self.convolutions.setdefault(layer, self.state.carry(layer))


class ModelHooks:
    """The hooks of one attached model.

    Args:
        model: what the caller calls; may wrap the language model.
        decoder: its decoder layers.
        gates: by layer.
        windows: where windows come from.
        recipe: the store's.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        gates: Mapping[int, Gate],
        windows: OpenWindows,
        recipe: Recipe,
    ) -> None:
        self._backbone, self._windows, self._recipe = decoder.backbone, windows, recipe
        self._gates = gates
        self._decoding = DecodingStates(recipe)
        self._parameters = list(inspect.signature(decoder.backbone.forward).parameters)
        self._ticket: int | None = None
        self._running: _Pass | None = None
        self._trained: list[_Pass] = []
        self._handles = self._register(model, decoder)

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._running, self._trained = [], None, []

    def _register(self, model: nn.Module, decoder: Decoder) -> list[RemovableHandle]:
        backbone = decoder.backbone
        handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True),
            backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            backbone.register_forward_hook(self._after_backbone, always_call=True),
        ]
        for number in self._gates:
            hook = self._before_layer(number)
            layer = decoder.layer(number)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def _before_model(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments:
        """Take the ticket out of a call of the whole model, for the backbone's hook."""
        self._ticket, kwargs = _split_ticket(kwargs)
        return args, kwargs

    def _before_backbone(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments:
        own, kwargs = _split_ticket(kwargs)  # where a wrapper around the model was not called
        ticket, self._ticket = (self._ticket if own is None else own), None
        self._running = None  # an earlier pass may have failed on its way
        self._trained = [done for done in self._trained if not done.rows.closed]
        self._running = self._begin(
            ticket, dict(zip(self._parameters, args, strict=False)) | kwargs
        )
        if self._running.rows.step is not None:
            self._trained.append(self._running)
        return args, kwargs

    def _begin(self, ticket: int | None, arguments: Mapping[str, Any]) -> _Pass:
        """Find or announce the window of a forward pass."""
        ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
        if ids is None:
            raise InputError(
                "Engram rows are looked up by token id: call the model with input_ids "
                "(inputs_embeds alone do not tell which rows to read)"
            )
        padding = _padding(arguments.get("attention_mask"), ids)
        mask = self._gate_mask(ids, padding)
        state = self._decoding.begin(cache, ids.shape[0])
        training = self._backbone.training and torch.is_grad_enabled()
        if state.seen and (training or ticket is not None):
            raise ProtocolError(
                "a KV cache can only be continued in evaluation, and not by a batch of "
                "look_ahead(): its window was announced without the tokens before it"
            )
        if ticket is not None:
            return _Pass(self._windows.claim(ticket), mask)
        tokens, host_padding = host_ids(ids), None if padding is None else host_ids(padding)
        rows = self._windows.announce(
            tokens,
            self._windows.step if training else None,
            context=state.context,
            attention_mask=host_padding,
        )
        return _Pass(rows, mask, None if training else _Decoding(state, tokens, host_padding))

    def _gate_mask(self, ids: Tensor, padding: Tensor | None) -> Tensor | None:
        """Where gates are open: not at padding, nor at tokens that hide themselves (images)."""
        if self._recipe.separator is None or not self._recipe.rules.separator_hides_itself:
            return padding
        text = ids != self._recipe.separator
        return text if padding is None else text & padding.bool()

    def _after_backbone(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        done, self._running = self._running, None
        if done is None or done.rows.step is not None:
            return
        self._windows.release(done.rows)
        cache, left = getattr(output, "past_key_values", None), done.decoding
        if left is not None and cache is not None:
            self._decoding.finish(
                left.state, cache, left.tokens, left.attention_mask, left.convolutions
            )

    def _before_layer(self, number: int) -> Callable[..., _Arguments]:
        """The hook of one decoder layer."""
        gate = self._gates[number]

        def add_residual(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> _Arguments:
            hidden = args[0] if args else kwargs["hidden_states"]
            now = self._pass_of(number, hidden)
            dtype = next(gate.parameters()).dtype
            rows = self._windows.lookup(now.rows, number, hidden.device, dtype)
            carry = None if now.decoding is None else now.decoding.carry(number)
            residual = gate(rows, hidden.to(dtype), mask=now.mask, carry=carry)
            hidden = hidden + residual.to(hidden.dtype)
            return (
                ((hidden, *args[1:]), kwargs)
                if args
                else (args, kwargs | {"hidden_states": hidden})
            )

        return add_residual

    def _pass_of(self, layer: int, hidden: Tensor) -> _Pass:
        """The forward pass that a layer belongs to.

        Outside of the backbone's forward pass the layer is run again by gradient checkpointing.
        Its input is then still the tensor of the first run, which checkpointing keeps alive: no
        younger pass that is still waiting for its backward pass can have the same address.
        """
        address = hidden.untyped_storage().data_ptr()
        if self._running is not None:
            self._running.inputs[layer] = address
            return self._running
        waiting = [p for p in self._trained if p.rows.awaits_gradient(layer)]
        for candidate in reversed(waiting):
            if candidate.inputs.get(layer) == address:
                return candidate
        if len(waiting) == 1:
            return waiting[0]
        raise ProtocolError(
            f"decoder layer {layer} ran outside of the model's forward pass, and it is not clear "
            "for which of the open windows; run backward() of a micro-batch before the next forward"
        )


def host_ids(ids: Any) -> TokenIds:
    """Token ids or a mask [batch, time] as int64 numpy; waits for the device they are on."""
    array: TokenIds = torch.as_tensor(ids).detach().cpu().to(torch.int64).numpy()
    return array


def _split_ticket(kwargs: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The ticket among a call's arguments, and the others."""
    ticket = kwargs.get(TICKET)
    others = {name: value for name, value in kwargs.items() if name != TICKET}
    return None if ticket is None else int(ticket), others


def _padding(attention_mask: Any, ids: Tensor) -> Tensor | None:
    """The part of a [batch, seen + time] attention mask that belongs to `ids` [batch, time]."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -ids.shape[1] :]
