"""Vocabulary compression: tokens that read alike share one id."""

from collections.abc import Callable
from functools import cache
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

TokenizerLike: TypeAlias = "Tokenizer | str | PathLike[str] | Any"
"""A `tokenizers.Tokenizer`, a transformers tokenizer, or the path of a tokenizer.json."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoders put for bytes that are no complete UTF-8 character."""
_LONE_SPACE = "\ue000"
"""Private-use character that carries a single space past stripping."""


def compress_vocabulary(tokenizer: TokenizerLike, size: int | None = None) -> NDArray[np.int32]:
    """The compressed id of every raw id, numbered in order of first appearance.

    Special and added tokens are treated like all others. A transformers tokenizer decodes with
    its own settings (as the official demo and engram-peft do), a `tokenizers.Tokenizer` or a
    file without them (as DeepSeek-V4.1 does); the two differ only for tokenizers with
    `clean_up_tokenization_spaces`.

    Source: Engram paper (arXiv:2601.07372), section 2.1; `CompressedTokenizer` of its demo.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, a transformers tokenizer, or the path of a
            tokenizer.json.
        size: number of raw ids. None: all of them, added tokens included. engram-peft takes
            `tokenizer.vocab_size`, which leaves added tokens out.

    Returns:
        int32 [size].

    Raises:
        RecipeError: `tokenizer` is none of these, its file cannot be read, or it is empty.
    """
    decode, token_of, known = _decoder(tokenizer)
    size = known if size is None else size
    if size < 1:
        raise RecipeError(f"a vocabulary has at least 1 token, got {size}")
    compressed: dict[str, int] = {}
    ids = (
        compressed.setdefault(_key(decode(raw), token_of, raw), len(compressed))
        for raw in range(size)
    )
    return np.fromiter(ids, dtype=np.int32, count=size)


@cache
def normalizer() -> "Normalizer":
    """The chain under which two tokens read alike.

    Source: the demo's `CompressedTokenizer`, same steps in the same order.
    """
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )


def text_key(text: str) -> str:
    """What `text` counts as: its normal form, or itself where nothing is left of it."""
    return normalizer().normalize_str(text) or text


def _key(text: str, token_of: Callable[[int], str | None], raw: int) -> str:
    """What a token counts as. Parts of characters have no text, so the raw token stands in."""
    if _INCOMPLETE in text:
        return token_of(raw) or text
    return text_key(text)


def _decoder(
    tokenizer: Any,
) -> tuple[Callable[[int], str], Callable[[int], str | None], int]:
    """How to get text and raw token of an id, and how many ids there are."""
    if isinstance(tokenizer, str | PathLike):
        return _decoder(_load(fspath(tokenizer)))
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        token_of, size = tokenizer.convert_ids_to_tokens, len(tokenizer)
    elif hasattr(tokenizer, "id_to_token"):
        token_of, size = tokenizer.id_to_token, tokenizer.get_vocab_size(with_added_tokens=True)
    else:
        raise RecipeError(
            f"cannot compress the vocabulary of a {type(tokenizer).__name__}; pass a "
            "tokenizers.Tokenizer, a transformers tokenizer, or the path of a tokenizer.json"
        )
    return lambda raw: tokenizer.decode([raw], skip_special_tokens=False), token_of, size


def _load(path: str) -> "Tokenizer":
    """A tokenizer from its file."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(path)
    except (KeyboardInterrupt, SystemExit):
        raise
    # The bindings raise Exception itself, and for some files a panic, which is no Exception.
    except BaseException as error:
        raise RecipeError(f"{path} cannot be read as a tokenizer.json: {error}") from error
