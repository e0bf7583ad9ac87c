"""Decoding with a KV cache."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from engram_store.errors import ProtocolError, WindowClosedError
from engram_store_client import Memory, attach
from tests.unit.client.tiny import (
    llama,
    make_session,
    make_tokens,
    qwen3,
    scramble,
)


@pytest.fixture(params=[llama, qwen3], ids=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    make: Callable[[], nn.Module] = request.param
    return make()


@pytest.fixture
def decoder(model: nn.Module) -> Iterator[tuple[Any, Memory]]:
    """A model in evaluation whose memory matters."""
    memory = attach(model, make_session())
    scramble(memory)
    model.eval()
    with torch.no_grad():
        yield model, memory


@pytest.mark.parametrize("cuts", [(4,), (1, 2), (8,), (3, 4, 5, 6, 7, 8)])
def test_a_prompt_in_chunks_gives_the_logits_of_one_pass(
    decoder: tuple[Any, Memory], cuts: tuple[int, ...]
) -> None:
    """N-grams and the convolution look back across the cuts."""
    model, _ = decoder
    tokens, cache, logits = make_tokens(), None, []
    whole = model(tokens, use_cache=False).logits

    for chunk in tokens.tensor_split(cuts, dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)

    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache_agree(decoder: tuple[Any, Memory], beams: int) -> None:
    """Greedy and beam search, in a batch with left padding."""
    model, _ = decoder
    tokens = make_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }

    cached = model.generate(tokens, use_cache=True, **settings)

    assert torch.equal(cached, model.generate(tokens, use_cache=False, **settings))


def test_a_prompt_in_chunks_of_generate(decoder: tuple[Any, Memory]) -> None:
    model, _ = decoder
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(make_tokens(), **settings)
    chunks = model.generate(make_tokens(), prefill_chunk_size=4, **settings)
    assert torch.equal(chunks, whole)


@pytest.mark.parametrize("beams", [1, 3])
def test_looking_one_token_ahead_changes_nothing(
    decoder: tuple[Any, Memory], monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    """Each token is announced once, and nothing stays open; beams are announced in vain."""
    model, memory = decoder
    announced = []
    announce = memory.session.announce

    def counting(tokens: Any, step: Any = None, **options: Any) -> Any:
        announced.append(announce(tokens, step, **options))
        return announced[-1]

    monkeypatch.setattr(memory.session, "announce", counting)
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(make_tokens()),
    }
    plain = model.generate(make_tokens(), **settings)
    passes = len(announced)
    ahead = model.generate(make_tokens(), stopping_criteria=[memory.next_token()], **settings)
    assert torch.equal(ahead, plain)
    if beams == 1:
        assert len(announced) == 2 * passes + 1  # the last token is not looked up any more
    memory.reader.forget_next()
    for window in announced:
        with pytest.raises(WindowClosedError):
            window.rows(0)


def test_a_guess_that_was_wrong_is_given_back(decoder: tuple[Any, Memory]) -> None:
    """Sampling goes on with other tokens than were announced."""
    model, memory = decoder
    tokens = make_tokens()
    expected = model(tokens).logits[:, -1]
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    memory.reader.announce_next((tokens[:, -1:] + 1) % 50)
    logits = model(tokens[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_a_cache_the_memory_did_not_follow_is_refused(decoder: tuple[Any, Memory]) -> None:
    """Copied, cropped or filled in training: never hashed as if nothing stood before."""
    model, memory = decoder
    tokens = make_tokens()
    cache = model(tokens, use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    cache.crop(-2)
    model.train()
    with torch.enable_grad():
        filled = model(tokens, use_cache=True).past_key_values
    model.eval()

    for other in (copied, cache, filled):
        with pytest.raises(ProtocolError, match="KV cache"):
            model(tokens[:, :1], past_key_values=other)
    (batch,) = memory.look_ahead([{"input_ids": tokens}], train=False)
    good = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ProtocolError, match="KV cache"):
        model(**batch, past_key_values=good)
