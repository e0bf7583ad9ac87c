"""The collator alone: in loops without a Trainer, with tokenizers, and in worker processes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from engram_store.errors import ConfigError, FingerprintMismatchError, InputError
from engram_store.recipes import compress_vocabulary, engram
from engram_store.testing import MemorySession
from engram_store.types import TableSpec
from engram_store_client import Memory, attach
from engram_store_client.trainer import EngramCollator
from tests.unit.client.tiny import LAYERS, contents, llama, make_session, make_tokens, same_tables
from tests.unit.trainer_runs import (
    Texts,
    pad,
)

# ---------------------------------------------------------------------- loops without a Trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_of_ten_lines_with_accelerate(workers: int) -> None:
    """The collator alone; the same tables as with `look_ahead`."""

    def prepared() -> tuple[Any, Memory, MemorySession, Any]:
        model, session = llama(), make_session()
        return model, attach(model, session), session, torch.optim.SGD(model.parameters(), lr=0.1)

    model, memory, session, optimizer = prepared()
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    loader: Any = torch.utils.data.DataLoader(
        Texts(12),
        batch_size=2,
        num_workers=workers,
        collate_fn=memory.collator(pad, accumulate=2),
    )
    model.train()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                memory.clip_grad_norm_(model.parameters(), 0.3)
                memory.commit(memory.step, lr=0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert memory.step == 3
    assert memory.reader.windows.announced_again == 0

    plain, other, expected, optimizer = prepared()
    plain.train()
    batches = [pad([Texts(12)[i], Texts(12)[i + 1]]) for i in range(0, 12, 2)]
    for number, batch in enumerate(other.look_ahead(batches, accumulate=2)):
        (plain(**batch).loss / 2).backward()
        if number % 2:
            other.clip_grad_norm_(plain.parameters(), 0.3)
            other.commit(other.step, lr=0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert same_tables(session, contents(expected))


def test_a_loop_that_says_nothing_about_accumulation_trains_all_the_same() -> None:
    """The number of batches of a step is wrong, so windows are announced again."""
    model, session = llama(), make_session()
    memory = attach(model, session)
    collate = memory.collator(pad)
    model.train()
    batches = [collate([Texts(12)[i], Texts(12)[i + 1]]) for i in range(0, 12, 2)]
    for number, batch in enumerate(batches):
        model(**batch).loss.backward()
        if number % 3 == 2:
            memory.commit(memory.step, lr=0.1)

    assert memory.step == 2
    assert memory.reader.windows.announced_again > 0
    assert session._windows == []


# ---------------------------------------------------------------------- collators and tokenizers


def tokenizer_of(words: list[str], *, pads: bool = True) -> PreTrainedTokenizerFast:
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)  # type: ignore[no-untyped-call]
    if pads:
        tokenizer.pad_token = words[0]
    return tokenizer


WORDS = ["<pad>", "one", "One", "two", "three", "four"]


@pytest.fixture(scope="module")
def of_words() -> Callable[[], Memory]:
    """Makes memories of a store for `WORDS`, in which two read alike."""
    compressed = compress_vocabulary(tokenizer_of(WORDS))
    recipe = engram(token_map=compressed, layers=LAYERS, rows_per_head=31, heads=2, pad_id=0)
    tables = {n: TableSpec(layer=n, rows=recipe.layer(n).rows, dim=4) for n in LAYERS}
    return lambda: attach(llama(), MemorySession(recipe, tables))


def test_a_tokenizer_makes_a_collator(of_words: Callable[[], Memory]) -> None:
    """It pads, makes labels, and adds a ticket; a Trainer finds the tokenizer to save it."""
    memory, tokenizer = of_words(), tokenizer_of(WORDS)
    collate = memory.collator(tokenizer)

    batch = collate([tokenizer("one two three"), tokenizer("four")])

    assert batch["input_ids"].shape == batch["labels"].shape == (2, 3)
    assert memory.ticket_key in batch
    assert collate.tokenizer is tokenizer
    with pytest.raises(ConfigError, match="pad_token"):
        memory.collator(tokenizer_of(WORDS, pads=False))
    with pytest.raises(ConfigError, match="makes no batches"):
        memory.collator(7)
    with pytest.raises(ConfigError, match="accumulate"):
        memory.collator(tokenizer, accumulate=0)


def test_another_tokenizer_than_the_stores_is_refused(of_words: Callable[[], Memory]) -> None:
    """Before a batch is made, alone or within a collator; unless it was asked not to look."""
    memory = of_words()
    other = tokenizer_of(["<pad>", "one", "two", "One", "three", "four"])

    class Collator:
        tokenizer = other

        def __call__(self, features: Any) -> Any:
            return {"input_ids": make_tokens(time=3) % 6}

    for given in (other, Collator()):
        with pytest.raises(FingerprintMismatchError, match="tokenizer"):
            memory.collator(given)
    assert memory.reader.windows.arrivals is None
    assert memory.ticket_key in memory.collator(Collator(), check=False)([])


def test_batches_that_cannot_be_looked_up_are_refused() -> None:
    """By the collator; packed ones are reported, once."""
    memory = attach(llama(), make_session())
    with pytest.raises(InputError, match="input_ids"):
        memory.collator(lambda _: {"labels": make_tokens()})([])
    with pytest.raises(InputError, match="tuple"):
        memory.collator(lambda _: (make_tokens(),))([])
    packed = memory.collator(
        lambda _: {
            "input_ids": make_tokens(batch=1, time=4),
            "position_ids": torch.tensor([[0, 1, 0, 1]]),
        }
    )
    with pytest.warns(RuntimeWarning, match="packed"):
        packed([])
    packed([])


def test_a_collator_goes_to_a_spawned_worker_without_the_store() -> None:
    """Pickled, it makes the same batches; their tickets come when they are unpacked here."""
    import pickle

    memory = attach(llama(), make_session())
    copy = pickle.loads(pickle.dumps(EngramCollator(memory, pad)))  # noqa: S301 - our own

    loader: Any = torch.utils.data.DataLoader(
        Texts(4), batch_size=2, num_workers=1, collate_fn=copy, multiprocessing_context="fork"
    )
    tickets = [batch[memory.ticket_key] for batch in loader]

    assert all(isinstance(ticket, int) for ticket in tickets)
    assert sorted(memory.reader.windows._ahead) == sorted(tickets)
    assert np.all(np.diff(tickets) > 0)
