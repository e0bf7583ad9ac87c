"""Whether a tokenizer is the one that a store was created for."""

from typing import Any

import numpy as np

from engram_store.errors import FingerprintMismatchError
from engram_store.recipes import Recipe, compress_vocabulary
from engram_store.recipes.compression import TokenizerLike

_SHOWN = 5


def check_tokenizer(tokenizer: TokenizerLike, recipe: Recipe) -> None:
    """Refuse a tokenizer whose ids mean other rows, or none at all, under a store's recipe.

    Recipes that compress keep the compressed id of every raw id, so tokenizers that read alike
    pass and no others. Recipes that hash raw ids keep only how many there are.

    Args:
        tokenizer: a transformers tokenizer, a processor that has one, a `tokenizers.Tokenizer`,
            or the path of a tokenizer.json.
        recipe: the store's.

    Raises:
        FingerprintMismatchError: says which ids differ.
        RecipeError: that is no tokenizer.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a multimodal processor
    kept = recipe.token_map
    if kept is None:
        size = _size(tokenizer)
        if size > recipe.vocabulary:
            raise FingerprintMismatchError("the tokenizer", {"ids": (recipe.vocabulary, size)})
        return
    ours = compress_vocabulary(tokenizer)
    differences: dict[str, tuple[Any, Any]] = {}
    # engram-peft's recipe knows no added tokens: it hashes larger ids as they are.
    more_is_fine = recipe.rules.keeps_large_ids
    if len(ours) < len(kept) or (len(ours) > len(kept) and not more_is_fine):
        differences["ids, added tokens included"] = (len(kept), len(ours))
    both = min(len(ours), len(kept))
    for raw in np.flatnonzero(kept[:both] != ours[:both])[:_SHOWN]:
        differences[f"compressed id of token {raw}"] = (int(kept[raw]), int(ours[raw]))
    if differences:
        raise FingerprintMismatchError("the tokenizer", differences)


def _size(tokenizer: Any) -> int:
    """How many ids a tokenizer knows, added tokens included. Raises: RecipeError."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return len(tokenizer)
    if hasattr(tokenizer, "get_vocab_size"):
        return int(tokenizer.get_vocab_size(with_added_tokens=True))
    return len(compress_vocabulary(tokenizer))
