"""What a recipe is: the numbers that turn token ids into row ids, and the one way to apply them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import RecipeError, ShapeError, UnknownLayerError
from engram_store.recipes.checks import (
    ID_LIMIT,
    check_orders,
    check_range,
    checked_ids,
    checked_out,
    checked_token_map,
    whole_numbers,
)
from engram_store.recipes.families import NO_TOKEN, RULES, Family, Rules
from engram_store.types import RowIds, TokenIds

if TYPE_CHECKING:
    from engram_store.kernels.hashing import HashPlan


@dataclass(frozen=True, kw_only=True)
class LayerHash:
    """The hash of one layer; each layer has a table of its own."""

    layer: int
    """Number of the layer, as its model's config counts."""
    multipliers: tuple[int, ...]
    """[max_order]"""
    moduli: tuple[tuple[int, ...], ...]
    """[orders][heads]: rows of each head's part of the table."""
    row_multiple: int = 1
    """Stored tables have unused rows up to a multiple of it."""

    def __post_init__(self) -> None:
        name = f"layer {self.layer}"
        if not all(0 < multiplier < 2**63 for multiplier in self.multipliers):
            raise RecipeError(f"{name}: multipliers must be positive int64: {self.multipliers}")
        if min(chain.from_iterable(self.moduli), default=0) < 2 or self.rows >= ID_LIMIT:
            raise RecipeError(
                f"{name}: each head has at least 2 rows, all together fewer than {ID_LIMIT:,}; "
                f"it has {self.rows:,}"
            )
        if self.row_multiple < 1:
            raise RecipeError(f"{name}: row_multiple must be at least 1, got {self.row_multiple}")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First row of each column's part, order-major and head-minor."""
        return (0, *accumulate(chain.from_iterable(self.moduli)))[:-1]

    @cached_property
    def rows(self) -> int:
        """Rows that can be looked up."""
        return sum(chain.from_iterable(self.moduli))

    @property
    def stored_rows(self) -> int:
        """Rows of the published table, padding included."""
        return -(-self.rows // self.row_multiple) * self.row_multiple

    @property
    def heads(self) -> int:
        """Hash heads of one order."""
        return len(self.moduli[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """How tokens become rows, for all layers of a model. Immutable.

    Build one with `engram`, `engram_peft`, `deepseek_v41` or `qwen_ple`, which derive the
    numbers, or directly from the numbers that a checkpoint ships.
    """

    family: Family
    """Names the rules (`families.RULES`) under which the numbers below are used."""
    orders: tuple[int, ...]
    """Lengths of the n-grams, increasing."""
    heads: int
    """Hash heads of each order."""
    layers: tuple[LayerHash, ...]
    vocabulary: int
    """Number of distinct ids that are hashed: it bounded the multipliers."""
    filler: int
    """Compressed id that stands before the start and behind a separator."""
    separator: int | None = None
    """Raw id that n-grams do not reach across."""
    token_map: NDArray[np.int32] | None = field(default=None, repr=False)
    """Compressed id of every raw id, read-only; None: raw ids are hashed."""

    def __post_init__(self) -> None:
        check_orders(self.orders, gaps_ok=self.rules.skips_orders)
        self._check_layers()
        if not 1 <= self.vocabulary <= ID_LIMIT:
            raise RecipeError(f"vocabulary must be 1 to {ID_LIMIT:,}, got {self.vocabulary}")
        if not 0 <= self.filler < ID_LIMIT:
            raise RecipeError(f"filler must be a token id, got {self.filler}")
        if self.separator is not None and not 0 <= self.separator < self.id_limit:
            raise RecipeError(f"separator {self.separator} is no id of the vocabulary")
        if self.rules.masks_padding and self.separator is None:
            raise RecipeError(f"a {self.family} recipe needs a separator")
        if self.rules.compresses != (self.token_map is not None):
            needs = "needs a" if self.rules.compresses else "takes no"
            raise RecipeError(f"a {self.family} recipe {needs} token map")
        if self.token_map is not None:
            object.__setattr__(self, "token_map", checked_token_map(self.token_map))

    def _check_layers(self) -> None:
        numbers = [layer.layer for layer in self.layers]
        if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise RecipeError(f"layers must be distinct numbers and at least one, got {numbers}")
        if self.heads < 1:
            raise RecipeError(f"heads must be at least 1, got {self.heads}")
        for layer in self.layers:
            name = f"layer {layer.layer}"
            if len(layer.multipliers) != self.max_order:
                raise RecipeError(
                    f"{name} needs {self.max_order} multipliers, has {len(layer.multipliers)}"
                )
            if [len(order) for order in layer.moduli] != [self.heads] * len(self.orders):
                raise RecipeError(
                    f"{name}: moduli must be [{len(self.orders)} orders][{self.heads} heads]"
                )

    @property
    def rules(self) -> Rules:
        """The rules of the recipe's family."""
        return RULES[self.family]

    @property
    def max_order(self) -> int:
        """Length of the longest n-gram."""
        return self.orders[-1]

    @property
    def context_length(self) -> int:
        """Tokens before a chunk that decide its rows."""
        return self.max_order - 1

    @property
    def columns(self) -> int:
        """Rows looked up by one token in one layer."""
        return len(self.orders) * self.heads

    @property
    def id_limit(self) -> int:
        """The first raw id too large to be hashed."""
        if self.rules.keeps_large_ids:
            return ID_LIMIT
        return self.vocabulary if self.token_map is None else len(self.token_map)

    def layer(self, number: int) -> LayerHash:
        """The hash of one layer. Raises: UnknownLayerError."""
        for layer in self.layers:
            if layer.layer == number:
                return layer
        raise UnknownLayerError(number, [layer.layer for layer in self.layers])

    def rows(
        self,
        layer: int,
        tokens: TokenIds,
        *,
        context: TokenIds | None = None,
        attention_mask: NDArray[Any] | None = None,
        out: RowIds | None = None,
    ) -> RowIds:
        """Row id of every look-up of a window in one layer's table.

        Each line of `tokens` is a sequence of its own. A sequence may be cut anywhere: with
        the `carry` of one chunk as `context` of the next, rows are those of a single pass.

        Source: Engram paper (arXiv:2601.07372), section 2.2; `kernels.hashing` has the formula.

        Args:
            layer: a layer of the recipe.
            tokens: int64 or int32 [batch, time] raw ids; copied unless they are int64,
                C-contiguous and writeable.
            context: int64 or int32 [batch, context_length] ids before `tokens`, `NO_TOKEN`
                before the start; None: `tokens` start their sequences.
            attention_mask: [batch, time], 0 marks padding. Only Qwen3.8-PLE hashes padding
                apart, as separators; elsewhere pads are ordinary tokens and this is ignored.
            out: int32 [batch, time, columns], C-contiguous, overwritten whole; None: a new
                array.

        Returns:
            `out`: row ids in [0, layer(layer).rows), order-major and head-minor.

        Raises:
            UnknownLayerError, ShapeError, DtypeError.
            TokenRangeError: an id cannot be hashed. `out` is untouched, here as above.
        """
        from engram_store.kernels.hashing import hash_rows

        plan = self._plan(layer)
        tokens = self._checked_tokens(tokens, attention_mask)
        before = self._checked_context(context, len(tokens))
        shape = (*tokens.shape, self.columns)
        out = np.empty(shape, np.int32) if out is None else checked_out(out, shape)
        scratch = np.empty((2, self.context_length + tokens.shape[1]), np.int64)
        hash_rows(tokens, before, plan, scratch, out)
        return out

    def carry(
        self,
        tokens: TokenIds,
        context: TokenIds | None = None,
        *,
        attention_mask: NDArray[Any] | None = None,
    ) -> TokenIds:
        """The `context` for the chunk that follows `tokens`; arguments as for `rows`.

        Returns:
            int64 [batch, context_length], `NO_TOKEN` where the sequence had not begun.
        """
        tokens = self._checked_tokens(tokens, attention_mask)
        before = self._checked_context(context, len(tokens))
        recent = tokens[:, max(0, tokens.shape[1] - self.context_length) :]
        return np.concatenate([before[:, recent.shape[1] :], recent], axis=1)

    def to_json(self) -> dict[str, Any]:
        """All numbers but the token map, as JSON types; `from_json` reads them back."""
        return {
            "family": str(self.family),
            "orders": list(self.orders),
            "heads": self.heads,
            "vocabulary": self.vocabulary,
            "filler": self.filler,
            "separator": self.separator,
            "token_map_sha256": self._token_map_sha256,
            "layers": [
                {
                    "layer": layer.layer,
                    "multipliers": list(layer.multipliers),
                    "moduli": [list(order) for order in layer.moduli],
                    "row_multiple": layer.row_multiple,
                }
                for layer in self.layers
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], token_map: NDArray[np.int32] | None) -> Self:
        """Inverse of `to_json`.

        Raises:
            RecipeError: keys or values are not those of a recipe, or `token_map` is not the
                map that it was stored with.
        """
        try:
            values = dict(data)
            digest = values.pop("token_map_sha256")
            recipe = cls(
                **values
                | {
                    "family": Family(values["family"]),
                    "orders": whole_numbers("orders", values["orders"]),
                    "layers": tuple(_layer_from_json(layer) for layer in values["layers"]),
                },
                token_map=token_map,
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise RecipeError(f"not a recipe: {error!r}") from error
        except ValueError as error:
            raise RecipeError(f"not a recipe: {error}") from error
        numbers = [recipe.heads, recipe.vocabulary, recipe.filler]
        whole_numbers("heads, vocabulary, filler", numbers)
        whole_numbers("separator", [] if recipe.separator is None else [recipe.separator])
        if recipe._token_map_sha256 != digest:
            raise RecipeError(
                f"the token map has SHA-256 {recipe._token_map_sha256}, its recipe was stored "
                f"with {digest}"
            )
        return recipe

    def fingerprint_fields(self) -> dict[str, str | int | list[Any]]:
        """Everything that decides which n-gram a row means, by name; equal for equal recipes.

        The token map appears as the SHA-256 of its little-endian int32 bytes.
        """
        fields: dict[str, str | int | list[Any]] = {
            "family": str(self.family),
            "orders": list(self.orders),
            "heads": self.heads,
            "vocabulary": self.vocabulary,
            "filler": self.filler,
            "separator": "none" if self.separator is None else self.separator,
            "token_map": self._token_map_sha256 or "none",
            "layers": [layer.layer for layer in self.layers],
        }
        for layer in self.layers:
            fields[f"layer {layer.layer} multipliers"] = list(layer.multipliers)
            fields[f"layer {layer.layer} moduli"] = [list(order) for order in layer.moduli]
        return fields

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recipe):
            return NotImplemented
        return self.fingerprint_fields() == other.fingerprint_fields()

    def __hash__(self) -> int:
        return hash((self.family, self.orders, self.layers, self._token_map_sha256))

    @cached_property
    def _token_map_sha256(self) -> str | None:
        if self.token_map is None:
            return None
        return hashlib.sha256(self.token_map.astype("<i4", copy=False).tobytes()).hexdigest()

    @cached_property
    def _plans(self) -> dict[int, "HashPlan"]:
        return {}

    def _plan(self, number: int) -> "HashPlan":
        """The layer's constants as the kernel reads them, made at first use."""
        if number not in self._plans:
            from engram_store.kernels.hashing import make_plan

            layer = self.layer(number)
            # Two threads may both get here; they write equal plans.
            self._plans[number] = make_plan(
                token_map=self.token_map,
                filler=self.filler,
                separator=self.separator,
                separator_hides_itself=self.rules.separator_hides_itself,
                oldest_first=self.rules.oldest_first,
                orders=self.orders,
                multipliers=layer.multipliers,
                moduli=layer.moduli,
            )
        return self._plans[number]

    def _checked_tokens(self, tokens: TokenIds, mask: NDArray[Any] | None) -> TokenIds:
        """Tokens as C-contiguous int64 [batch, time] with padding replaced."""
        checked = checked_ids("tokens", tokens)
        if mask is not None and self.rules.masks_padding:
            if np.shape(mask) != checked.shape:
                raise ShapeError(
                    "attention_mask", np.shape(mask), f"that of tokens {checked.shape}"
                )
            checked = np.where(np.asarray(mask) != 0, checked, np.int64(self.filler))
        check_range(checked, self.id_limit, negative_ok=self.rules.keeps_negative_ids)
        return checked

    def _checked_context(self, context: TokenIds | None, batch: int) -> TokenIds:
        """Context as C-contiguous int64 [batch, context_length]."""
        shape = (batch, self.context_length)
        if context is None:
            return np.full(shape, NO_TOKEN, np.int64)
        checked = checked_ids("context", context)
        if checked.shape != shape:
            raise ShapeError("context", checked.shape, f"[batch, context_length] = {shape}")
        check_range(
            checked,
            self.id_limit,
            negative_ok=self.rules.keeps_negative_ids,
            context=True,
        )
        return checked


def _layer_from_json(data: Mapping[str, Any]) -> LayerHash:
    return LayerHash(
        **dict(data)
        | {
            "layer": whole_numbers("layer", [data["layer"]])[0],
            "multipliers": whole_numbers("multipliers", data["multipliers"]),
            "moduli": tuple(whole_numbers("moduli", order) for order in data["moduli"]),
            "row_multiple": whole_numbers("row_multiple", [data["row_multiple"]])[0],
        }
    )
