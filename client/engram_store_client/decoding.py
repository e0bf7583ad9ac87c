"""What generation with a KV cache carries from one forward pass to the next.

A KV cache spares the model from seeing earlier tokens again, but n-grams and the short
convolution look back too. Their state follows the cache object it belongs to: same length, same
order of sequences. Where it cannot follow, a forward pass fails instead of hashing a token as if
nothing stood before it.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engram_store.errors import ProtocolError
from engram_store.recipes import Recipe
from engram_store.types import TokenIds
from engram_store_client.gates import ConvCarry


@dataclass(eq=False)
class DecodingState:
    """Where a batch of sequences stands."""

    batch: int
    seen: int = 0
    """Tokens so far, padding included: the length of the cache."""
    context: TokenIds | None = None
    """int64 [batch, recipe.context_length]; None before the first token."""
    convolutions: dict[int, ConvCarry] = field(default_factory=dict)
    """By layer."""

    def carry(self, layer: int) -> ConvCarry:
        """One layer's convolution state, to be advanced by its gate and given to `finish`."""
        return replace(self.convolutions.get(layer, ConvCarry()))

    def select(self, indices: Tensor) -> None:
        """Reorder, repeat or drop sequences: entry i continues sequence `indices[i]`."""
        if self.context is not None:
            self.context = self.context[indices.cpu().numpy()]
        for carry in self.convolutions.values():
            carry.select(indices)
        self.batch = len(indices)


class DecodingStates:
    """Decoding states by cache object, for as long as the cache lives."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._states: weakref.WeakKeyDictionary[Any, DecodingState] = weakref.WeakKeyDictionary()

    def begin(self, cache: Any, batch: int) -> DecodingState:
        """The state a forward pass starts from; a new one for an empty cache or none.

        Raises:
            ProtocolError: the cache holds tokens that this memory did not see.
        """
        seen = 0 if cache is None else int(cache.get_seq_length())
        if seen == 0:
            return DecodingState(batch)
        state = self._states.get(cache)
        if state is None or state.seen != seen or state.batch != batch:
            known = "none" if state is None else f"{state.batch} of {state.seen} tokens"
            raise ProtocolError(
                f"the KV cache holds {batch} sequences of {seen} tokens, the memory followed "
                f"{known}: it was copied, cropped, or filled in training or before attach(). "
                "Start with an empty cache, or generate with use_cache=False"
            )
        return state

    def finish(
        self,
        state: DecodingState,
        cache: Any,
        tokens: TokenIds,
        attention_mask: TokenIds | None,
        convolutions: Mapping[int, ConvCarry],
    ) -> None:
        """Remember that `tokens` [batch, time] were seen and are in `cache` now."""
        if cache is None or not hasattr(cache, "get_seq_length"):
            return
        state.context = self._recipe.carry(tokens, state.context, attention_mask=attention_mask)
        state.seen += tokens.shape[1]
        state.convolutions = dict(convolutions)
        if self._states.get(cache) is not state:
            self._states[cache] = state
            _follow(cache, state)


def _follow(cache: Any, state: DecodingState) -> None:
    """Let the cache's own reordering (beam search) move the state along."""

    def repeated(count: int) -> Tensor:
        return torch.arange(state.batch).repeat_interleave(count)

    moves: dict[str, Callable[[Any], Tensor]] = {
        "reorder_cache": torch.as_tensor,
        "batch_select_indices": torch.as_tensor,
        "batch_repeat_interleave": repeated,
    }
    for name, indices_of in moves.items():
        if hasattr(type(cache), name):
            setattr(cache, name, _moving(cache, name, state, indices_of))


def _moving(
    cache: Any, name: str, state: DecodingState, indices_of: Callable[[Any], Tensor]
) -> Callable[[Any], None]:
    """`cache.name`, followed by the same move of `state`."""
    method = getattr(type(cache), name)
    owner = weakref.ref(cache)  # a strong one would keep a whole KV cache until the next gc

    def move(argument: Any) -> None:
        method(owner(), argument)
        state.select(indices_of(argument))

    return move
