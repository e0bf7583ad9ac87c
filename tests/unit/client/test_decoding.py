"""Decoding with a KV cache."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from engram_store.errors import (
    ProtocolError,
)
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
