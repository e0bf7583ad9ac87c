"""One memory's part in the forward passes of its model: its windows and its residuals."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from engram_store.errors import ProtocolError
from engram_store.recipes import Recipe
from engram_store.types import TokenIds
from engram_store_client.decoding import DecodingState, DecodingStates
from engram_store_client.gates import ConvCarry, Gate
from engram_store_client.ids import Call, host_ids, ticket_key
from engram_store_client.rows import WindowRows
from engram_store_client.windows import OpenWindows


@dataclass(eq=False)
class Decoding:
    """What a forward pass that may be continued leaves behind."""

    state: DecodingState
    tokens: TokenIds
    attention_mask: TokenIds | None
    convolutions: dict[int, ConvCarry] = field(default_factory=dict)

    def carry(self, layer: int) -> ConvCarry:
        """A layer's convolution state, advanced by its gate."""
        return self.convolutions.setdefault(layer, self.state.carry(layer))


@dataclass(eq=False)
class Share:
    """One memory's share of one forward pass."""

    reader: "Reader"
    rows: WindowRows
    mask: Tensor | None
    """[B, T], 0 where gates stay shut."""
    scale: float
    announced_before: bool = False
    """Whether the window came by a ticket; it may be used again then."""
    decoding: Decoding | None = None

    def awaits_gradient(self, layer: int) -> bool:
        """Whether the layer may still be run again, by gradient checkpointing."""
        if layer not in self.reader.gates or self.rows.closed:
            return False
        # The rows of the control arm get no gradient that would tell.
        return self.reader.windows.zero_table or self.rows.awaits_gradient(layer)

    def residual(self, layer: int, hidden: Tensor) -> Tensor:
        """What the memory adds to hidden states [B, T, D] before a layer; same shape and dtype."""
        gate = self.reader.gates[layer]
        dtype = next(gate.parameters()).dtype
        rows = self.reader.windows.lookup(self.rows, layer, hidden.device, dtype)
        carry = None if self.decoding is None else self.decoding.carry(layer)
        residual: Tensor = gate(rows, hidden.to(dtype), mask=self.mask, carry=carry)
        residual = residual.to(hidden.dtype)
        return residual if self.scale == 1.0 else residual * self.scale


@dataclass(frozen=True, eq=False)
class _Guess:
    """A window of tokens that a sequence is going to be continued with."""

    state: "weakref.ref[DecodingState]"
    context: TokenIds | None
    """Of the state, when the window was announced: the very array."""
    tokens: TokenIds
    rows: WindowRows

    def holds(self, state: DecodingState, tokens: TokenIds, padding: TokenIds | None) -> bool:
        """Whether a forward pass continues just so."""
        return (
            self.state() is state
            and self.context is state.context
            and np.array_equal(self.tokens, tokens)
            and (padding is None or bool(padding.all()))
        )


class Reader:
    """What a memory does in forward passes; `ModelHooks` calls it.

    Args:
        name: of the memory.
        gates: by layer.
        windows: where windows come from.
        recipe: the store's.
        before_training: called before each forward pass that trains.
    """

    def __init__(
        self,
        name: str,
        gates: Mapping[int, Gate],
        windows: OpenWindows,
        recipe: Recipe,
        before_training: Callable[[], None],
    ) -> None:
        self.name, self.ticket_key = name, ticket_key(name)
        self._before_training = before_training
        self.gates, self.windows = gates, windows
        self.enabled, self.scale = True, 1.0
        self._recipe = recipe
        self._decoding = DecodingStates(recipe)
        self._last: weakref.ref[DecodingState] | None = None
        self._guess: _Guess | None = None

    def begin(self, call: Call, *, training: bool) -> Share:
        """Find or announce the window of a forward pass.

        Raises: ProtocolError for a KV cache that cannot be continued; what `announce` raises.
        """
        if training:
            self._before_training()
        ids, ticket = call.input_ids, call.tickets.get(self.ticket_key)
        mask = self._gate_mask(ids, call.padding)
        state = self._decoding.begin(call.cache, ids.shape[0])
        if state.seen and (training or ticket is not None):
            raise ProtocolError(
                "a KV cache can only be continued in evaluation, and not by a batch of "
                "look_ahead(): its window was announced without the tokens before it"
            )
        if ticket is not None:
            claimed = self.windows.claim(ticket, training=training, shape=tuple(ids.shape))
            if claimed is not None:
                return Share(self, claimed, mask, self.scale, announced_before=True)
        tokens = host_ids(ids)
        padding = None if call.padding is None else host_ids(call.padding)
        rows = self._take_guess(state, tokens, padding) or self.windows.announce(
            tokens,
            self.windows.step if training else None,
            context=state.context,
            attention_mask=padding,
        )
        decoding = None if training else Decoding(state, tokens, padding)
        return Share(self, rows, mask, self.scale, decoding=decoding)

    def announce_next(self, ids: Tensor) -> None:
        """Announce the tokens that the last forward pass with a KV cache is going on with.

        A guess: if the next pass goes on with others, the window is given back unused.

        Args:
            ids: [batch, 1].
        """
        self.forget_next()
        state = None if self._last is None else self._last()
        if not self.enabled or state is None or state.batch != ids.shape[0]:
            return
        tokens, reference = host_ids(ids), weakref.ref(state)
        rows = self.windows.announce(tokens, None, context=state.context)
        self._guess = _Guess(reference, state.context, tokens, rows)

    def forget_next(self) -> None:
        """Give back what `announce_next` announced and no forward pass took."""
        guess, self._guess = self._guess, None
        if guess is not None:
            self.windows.release(guess.rows)

    def _take_guess(
        self, state: DecodingState, tokens: TokenIds, padding: TokenIds | None
    ) -> WindowRows | None:
        guess = self._guess
        if guess is None or guess.rows.closed or not guess.holds(state, tokens, padding):
            self.forget_next()
            return None
        self._guess = None
        return guess.rows

    def turn_away(self, tickets: Mapping[str, int]) -> None:
        """Give back the window of a batch that the memory, not active now, announced before."""
        ticket = tickets.get(self.ticket_key)
        if ticket is not None:
            self.windows.abandon([ticket])

    def give_up(self, share: Share) -> None:
        """The forward pass did not come about: nobody will push a gradient for its window."""
        if not share.announced_before:
            self.windows.release(share.rows)

    def end(self, share: Share, cache: object) -> None:
        """The forward pass is done; windows that were only read go back."""
        if share.rows.step is not None:
            return
        self.windows.release(share.rows)
        left = share.decoding
        if left is not None and cache is not None:
            self._decoding.finish(
                left.state, cache, left.tokens, left.attention_mask, left.convolutions
            )
            self._last = weakref.ref(left.state)

    def _gate_mask(self, ids: Tensor, padding: Tensor | None) -> Tensor | None:
        """Where gates are open: not at padding, nor at tokens that hide themselves (images)."""
        if self._recipe.separator is None or not self._recipe.rules.separator_hides_itself:
            return padding
        text = ids != self._recipe.separator
        return text if padding is None else text & padding.bool()
