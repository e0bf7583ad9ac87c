"""Attaching to models of every kind, by their structure alone."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from engram_store.errors import ConfigError, InputError, ProtocolError, UnknownLayerError
from engram_store_client import attach
from engram_store_client.structure import find_decoder, unwrapped
from tests.unit.client.models import IMAGE, MULTIMODAL, TEXT, llava, logits, make, shape_of
from tests.unit.client.tiny import LAYERS, contents, llama, loss_of, make_session, make_tokens
from tests.unit.client.tiny import scramble as scramble_gates


@pytest.mark.parametrize("kind", [*TEXT, *MULTIMODAL])
def test_every_kind_of_model_learns_through_its_own_layers(kind: str) -> None:
    """A fresh identity changes no bit, a gradient changes rows, detaching restores the model."""
    model, session, tokens = make(kind), make_session(), make_tokens()
    before, shape = logits(model, tokens), shape_of(model)
    rows = contents(session)

    memory = attach(model, session, identity_init=True)
    assert torch.equal(logits(model, tokens), before)
    scramble_gates(memory)
    assert not torch.equal(logits(model, tokens), before)
    model.train()
    loss_of(model, tokens).backward()
    applied = memory.commit(0, lr=1.0)

    for number in LAYERS:
        assert applied.rows[number] == len(np.unique(session.recipe.rows(number, tokens.numpy())))
        assert (session.contents[number].rows != rows[number]).any()
    memory.detach()
    model.eval()
    assert shape_of(model) == shape
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_language_model_is_found_beside_the_vision_tower(kind: str) -> None:
    """By what embeds tokens."""
    decoder = find_decoder(make(kind))

    assert decoder.path == "model.language_model.layers"
    assert decoder.hidden_size() == 32
    assert len(decoder.layers) == 3


def test_images_go_to_the_vision_tower_and_their_ids_to_the_store() -> None:
    """The language model sees embeddings only; rows are those of the ids of the whole call."""
    model, session = llava(), make_session()
    memory = attach(model, session)
    scramble_gates(memory)
    tokens = make_tokens(time=9).clamp_max(IMAGE - 1)
    tokens[:, 2:6] = IMAGE  # (16 / 8) ** 2 patches
    seen: list[Tensor] = []
    announce = memory._windows.announce

    def spy(ids: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(torch.from_numpy(ids))
        return announce(ids, *args, **kwargs)

    memory._windows.announce = spy  # type: ignore[assignment, method-assign]
    pixels = torch.randn(2, 3, 16, 16)
    with_image = logits(model, tokens, pixel_values=pixels)
    (batch,) = memory.look_ahead([{"input_ids": tokens}])
    model.train()
    model(**batch, pixel_values=pixels, labels=tokens).loss.backward()
    memory.commit(0, lr=1.0)

    assert [torch.equal(ids, tokens) for ids in seen] == [True, True]
    assert not torch.equal(with_image, logits(model, tokens, pixel_values=-pixels))
    with pytest.raises(InputError, match="token id"):
        model(inputs_embeds=torch.zeros(2, 9, 32))


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "llava"])
def test_generation_with_a_cache_follows_the_ids_of_the_whole_call(kind: str) -> None:
    """Also where the language model is called with embeddings, after an image."""
    model = make(kind).eval()
    scramble_gates(attach(model, make_session()))
    tokens = make_tokens(time=9).clamp_max(40)
    inputs: dict[str, Any] = {}
    if kind == "llava":
        tokens[:, 2:6] = IMAGE
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16)

    generate: Any = model.generate
    common = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **inputs}
    cached = generate(input_ids=tokens, use_cache=True, **common)

    assert torch.equal(cached, generate(input_ids=tokens, use_cache=False, **common))


class DistributedDataParallel(nn.Module):
    """Has the name and the parts of torch's own, for which several processes would be needed."""

    def __init__(self, module: nn.Module, ranks: int) -> None:
        super().__init__()
        self.module, self.process_group = module, SimpleNamespace(size=lambda: ranks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_data_parallel_wrappers_are_seen_through_but_gates_must_come_first() -> None:
    """What averages gradients over ranks knows only the parameters that it was made with."""
    tokens = make_tokens()
    for wrap in (nn.DataParallel, lambda model: DistributedDataParallel(model, 1)):
        model = llama()
        wrapped = wrap(model)
        memory = attach(wrapped, make_session())
        scramble_gates(memory)
        (batch,) = memory.look_ahead([{"input_ids": tokens}])
        wrapped(**batch, labels=tokens).loss.backward()
        assert sum(memory.commit(0, lr=1.0).rows.values()) > 0
        assert model.get_submodule("engram_memory.default") is memory.gates

    model = llama()
    shape = shape_of(model)
    with pytest.raises(ConfigError, match="attach the memory first, then wrap"):
        attach(DistributedDataParallel(model, 2), make_session())
    several = nn.DataParallel(model)
    several.device_ids = [0, 1]
    with pytest.raises(ConfigError, match="one process per device"):
        attach(several, make_session())
    assert shape_of(model) == shape


class Wrapper(nn.Module):
    """Calls a model twice with ids of its own making."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(input_ids[:, :5]).logits, self.inner(input_ids[:, 5:]).logits


def test_a_wrapper_that_calls_its_model_with_other_ids_is_read_inside() -> None:
    """The innermost ids count."""
    model = llama().eval()
    memory = attach(Wrapper(model), make_session())
    scramble_gates(memory)
    tokens = make_tokens()

    first, second = Wrapper(model)(tokens)
    with torch.no_grad():
        together = memory.model(tokens)

    torch.testing.assert_close(together[0], first)
    torch.testing.assert_close(together[1], second)


def test_models_without_such_a_structure_are_refused() -> None:
    """Encoder-decoders, encoders, vision models; the message says what there is instead."""
    small: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    bart = BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    refused: dict[str, list[nn.Module]] = {
        "encoder-decoder": [
            BartForConditionalGeneration(bart),
            T5ForConditionalGeneration(
                T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
        ],
        "expected one ModuleList": [
            BertModel(BertConfig(vocab_size=50, intermediate_size=16, **small)),
            ViTModel(ViTConfig(intermediate_size=16, image_size=16, patch_size=8, **small)),
            nn.Sequential(nn.Linear(2, 2)),
        ],
    }
    for reason, models in refused.items():
        for model in models:
            shape = shape_of(model)
            with pytest.raises(ConfigError, match=reason):
                attach(model, make_session())
            assert shape_of(model) == shape


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layers": [1]}, UnknownLayerError, "layer 1"),
        ({"layers": []}, ConfigError, "at least one"),
        ({"layers": [0, 0]}, ConfigError, "different"),
        ({"layers": ["0"]}, ConfigError, "whole numbers"),
        ({"layers": [True]}, ConfigError, "whole numbers"),
        ({"gate": "other"}, ConfigError, "unknown gate"),
        ({"colour": "red"}, ConfigError, "options"),
        ({"mode": "most"}, ConfigError, "engram_only, preserve_trainable, full"),
        ({"init": "zeros"}, ConfigError, "unknown init"),
        ({"name": "a.b"}, ConfigError, "cannot be called"),
        ({"name": "keys"}, ConfigError, "cannot be called"),
        ({"name": "hooks"}, ConfigError, "cannot be called"),
        ({"name": "lora_x"}, ConfigError, "lora_"),
        ({"name": "default"}, ConfigError, "already"),
    ],
)
def test_a_refusal_leaves_nothing_half_attached(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    """Also beside a memory that is there: modules, hooks, flags and windows are as before."""
    model, session = llama(), make_session()
    beside = attach(model, make_session(), mode="preserve_trainable")
    shape, memories = shape_of(model), dict(beside._modules.memories)

    with pytest.raises(error, match=match):
        attach(model, session, **{"name": "other", **options})

    assert shape_of(model) == shape
    assert beside._modules.memories == memories
    assert session._announced == 0
    beside.detach()


def test_layers_that_the_model_lacks_are_refused() -> None:
    """The store has a table for layer 2, the model only two layers."""
    model = llama()
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    del layers[2]
    shape = shape_of(model)

    with pytest.raises(ConfigError, match="no layer 2"):
        attach(model, make_session())

    assert shape_of(model) == shape


def test_weights_that_are_not_there_are_refused() -> None:
    """As offloading leaves them."""
    model = llama().to("meta")

    with pytest.raises(ConfigError, match="onto a device"):
        attach(model, make_session())


@pytest.mark.parametrize("beside", [False, True])
def test_what_fails_on_the_way_in_is_undone(
    monkeypatch: pytest.MonkeyPatch, *, beside: bool
) -> None:
    """Whatever it is, and whether or not there is another memory."""
    model = llama()
    if beside:
        attach(model, make_session(), name="beside", layers=[0])
    shape = shape_of(model)
    last = model.get_submodule("model.layers.2")

    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(last, "register_forward_pre_hook", fail)
    with pytest.raises(RuntimeError, match="no hooks"):
        attach(model, make_session(), mode="full")
    monkeypatch.undo()

    assert shape_of(model) == shape


def test_a_part_of_an_attached_model_is_refused() -> None:
    """Its hooks would run twice."""
    model = llama()
    attach(model, make_session())

    with pytest.raises(ConfigError, match="part of one that has a memory"):
        attach(model.get_submodule("model"), make_session(), name="other")


def test_an_attached_model_is_saved_with_its_gates(tmp_path: Path) -> None:
    """By transformers, as any submodule."""
    model: Any = llama()
    memory = attach(model, make_session())

    model.save_pretrained(tmp_path)

    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in memory.gates.state_dict().items():
        assert torch.equal(saved[f"engram_memory.default.{name}"], tensor)


def test_an_attached_model_cannot_be_copied_until_it_is_detached() -> None:
    """A copy would share the store's windows; the message says what to do."""
    model = llama()
    memory = attach(model, make_session())

    with pytest.raises(ProtocolError, match="save_pretrained"):
        copy.deepcopy(model)
    memory.detach()
    copy.deepcopy(model)


class Layer(nn.Module):
    """Enough of a decoder layer to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        mixed: Tensor = hidden_states + self.self_attn(hidden_states)
        return mixed


class Small(nn.Module):
    """Enough of a language model to be compiled quickly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_torch_compile_keeps_the_memory_wherever_it_is_attached() -> None:
    """Also to a model that was compiled and has run: it is looked at again."""
    tokens, plain, model = make_tokens(), Small(), Small()
    scramble_gates(attach(plain, make_session(), hidden_size=32))
    expected = plain(tokens)
    compiled: Any = torch.compile(model, backend="eager")
    without = compiled(tokens)

    memory = attach(compiled, make_session(), hidden_size=32)
    scramble_gates(memory)
    with_memory = compiled(tokens)
    with_memory.square().mean().backward()
    applied = memory.commit(0, lr=1.0)
    memory.detach()

    assert unwrapped(compiled) is model
    torch.testing.assert_close(with_memory, expected)
    assert sum(applied.rows.values()) > 0
    torch.testing.assert_close(compiled(tokens), without)
