"""Vocabulary compression."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from engram_store.errors import RecipeError
from engram_store.recipes import compress_vocabulary
from engram_store.recipes.compression import text_key

GOLDEN = Path(__file__).parents[1] / "golden"


def word_tokenizer(*words: str) -> Tokenizer:
    """A tokenizer with just these tokens, in this order."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_ids_are_numbered_in_order_of_first_appearance() -> None:
    tokenizer = word_tokenizer("<pad>", "the", "The", "b", "THE", "B")
    ids = compress_vocabulary(tokenizer)
    assert ids.dtype == np.int32
    assert ids.tolist() == [0, 1, 1, 2, 1, 2]


def test_added_tokens_count_unless_size_leaves_them_out() -> None:
    tokenizer = word_tokenizer("a", "b")
    tokenizer.add_tokens([AddedToken("A", normalized=False), AddedToken("c", normalized=False)])
    assert compress_vocabulary(tokenizer).tolist() == [0, 1, 0, 2]
    assert compress_vocabulary(tokenizer, size=2).tolist() == [0, 1]


def test_incomplete_characters_keep_their_raw_token() -> None:
    """Byte tokens that are no whole character stay apart, whatever they would normalise to."""
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer_metaspace.json"))
    ids = compress_vocabulary(tokenizer)
    incomplete = [
        raw
        for raw in range(tokenizer.get_vocab_size())
        if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([raw], skip_special_tokens=False)
    ]
    assert len(incomplete) > 100
    assert len({int(ids[raw]) for raw in incomplete}) == len(incomplete)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (" The", "the"),
        ("\n\t", " "),
        ("\N{NO-BREAK SPACE}", " "),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}", "a"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", "e"),
        ("\N{GREEK SMALL LETTER FINAL SIGMA}", "\N{GREEK SMALL LETTER FINAL SIGMA}"),
        ("\N{LATIN SMALL LETTER SHARP S}", "\N{LATIN SMALL LETTER SHARP S}"),
        ("\N{COMBINING ACUTE ACCENT}", "\N{COMBINING ACUTE ACCENT}"),
        ("", ""),
    ],
)
def test_what_texts_count_as(text: str, key: str) -> None:
    """The last two normalise to nothing, so they stay themselves."""
    assert text_key(text) == key


@pytest.mark.parametrize("name", ["bytelevel", "metaspace"])
def test_path_tokenizer_and_transformers_tokenizer_agree(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = GOLDEN / f"tokenizer_{name}.json"
    expected = compress_vocabulary(path)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    np.testing.assert_array_equal(compress_vocabulary(wrapped), expected)
    np.testing.assert_array_equal(compress_vocabulary(str(path)), expected)


def test_the_map_is_the_same_bytes_on_every_machine() -> None:
    """Its hash is part of a store's fingerprint."""
    ids = compress_vocabulary(GOLDEN / "tokenizer_bytelevel.json")
    digest = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    assert digest == "1c03f03d1abff3d77873112e44d8cf9b0f6782adb397881b893a75b347b7ece3"


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{", "utf-8")
    for bad in (broken, tmp_path / "absent.json", 3):
        with pytest.raises(RecipeError):
            compress_vocabulary(bad)
    with pytest.raises(RecipeError):
        compress_vocabulary(word_tokenizer("a"), size=0)
