"""A tokenizer that is not the store's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engram_store.errors import FingerprintMismatchError, RecipeError
from engram_store.recipes import Recipe, compress_vocabulary, engram, engram_peft, qwen_ple
from engram_store.testing import MemorySession
from engram_store.types import TableSpec
from engram_store_client import attach, check_tokenizer
from tests.unit.client.models import shape_of
from tests.unit.client.tiny import llama

GOLDEN = Path(__file__).parents[2] / "golden"
FILE, OTHER = GOLDEN / "tokenizer_bytelevel.json", GOLDEN / "tokenizer_metaspace.json"
SHAPE: dict[str, Any] = {"layers": [0], "rows_per_head": 31, "heads": 2}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return engram(token_map=compress_vocabulary(FILE), pad_id=0, **SHAPE)


def hugging_face() -> PreTrainedTokenizerFast:
    make: Any = PreTrainedTokenizerFast
    found: PreTrainedTokenizerFast = make(
        tokenizer_file=str(FILE), clean_up_tokenization_spaces=False
    )
    return found


class Processor:
    """A multimodal processor keeps its tokenizer inside."""

    def __init__(self) -> None:
        self.tokenizer = hugging_face()


@pytest.mark.parametrize(
    "make", [lambda: FILE, lambda: Tokenizer.from_file(str(FILE)), hugging_face, Processor]
)
def test_the_stores_own_tokenizer_passes_in_every_form(recipe: Recipe, make: Any) -> None:
    """A file, a tokenizer of either library, a processor."""
    check_tokenizer(make(), recipe)


def test_another_tokenizer_is_refused_with_what_differs(recipe: Recipe) -> None:
    """By the number of ids or by what they mean; nothing is attached."""
    model = llama()
    shape = shape_of(model)
    spec = TableSpec(layer=0, rows=recipe.layer(0).rows, dim=4)
    session = MemorySession(recipe, {0: spec})
    with pytest.raises(FingerprintMismatchError, match="the tokenizer does not fit this store"):
        attach(model, session, tokenizer=OTHER)
    assert shape_of(model) == shape
    attach(model, session, tokenizer=FILE).detach()

    assert recipe.token_map is not None
    changed = np.array(recipe.token_map)
    changed[[7, 9]] = changed[[9, 7]]
    swapped = engram(token_map=changed, pad_id=0, **SHAPE)
    with pytest.raises(FingerprintMismatchError) as caught:
        check_tokenizer(FILE, swapped)
    assert set(caught.value.differences) == {
        "compressed id of token 7",
        "compressed id of token 9",
    }


def test_added_tokens_count_where_the_recipe_hashes_them(recipe: Recipe) -> None:
    """engram-peft's recipe passes larger ids through; the others have no row for them."""
    larger = hugging_face()
    larger.add_tokens(["<one more>"])
    token_map = compress_vocabulary(FILE)
    peft: dict[str, Any] = {"layers": [0], "rows_per_order": [62, 62], "heads": 2, "pad_id": 0}
    lenient = engram_peft(token_map=token_map, **peft)

    check_tokenizer(larger, lenient)
    with pytest.raises(FingerprintMismatchError, match="added tokens included"):
        check_tokenizer(larger, recipe)
    with pytest.raises(FingerprintMismatchError, match="added tokens included"):
        check_tokenizer(FILE, engram_peft(token_map=np.append(token_map, 0), **peft))


def test_raw_ids_must_fit_into_the_vocabulary() -> None:
    """Qwen's recipe keeps no map: only how many ids there are."""
    size = len(hugging_face())

    for tokenizer in (hugging_face(), Tokenizer.from_file(str(FILE)), FILE):
        check_tokenizer(tokenizer, qwen_ple(vocabulary=size, eos_id=1, **SHAPE))
        with pytest.raises(FingerprintMismatchError, match=f"store {size - 1}, the tokenizer"):
            check_tokenizer(tokenizer, qwen_ple(vocabulary=size - 1, eos_id=1, **SHAPE))


def test_what_is_no_tokenizer_is_refused(recipe: Recipe) -> None:
    """The message says what would be one."""
    for wrong in (object(), 5):
        with pytest.raises(RecipeError, match="transformers tokenizer"):
            check_tokenizer(wrong, recipe)
