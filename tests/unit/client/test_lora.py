"""Memories together with peft, whichever comes first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from engram_store.testing import MemorySession
from engram_store_client import Memory, attach, memories
from tests.unit.client.models import flags, logits, make
from tests.unit.client.tiny import contents, loss_of, make_session, make_tokens, same_tables

# peft 0.21 asks transformers 5.23 by a name that it is about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

Made: TypeAlias = tuple[Any, Memory, MemorySession]


def lora(**options: Any) -> LoraConfig:
    fields: dict[str, Any] = {
        "r": 2,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**fields | {"init_lora_weights": False, **options})


def lora_first(mode: str = "preserve_trainable", **options: Any) -> Made:
    session = make_session()
    model = get_peft_model(make("llama"), lora(**options))
    return model, attach(model, session, mode=mode, bias=True), session


def memory_first(mode: str = "preserve_trainable", **options: Any) -> Made:
    session, model = make_session(), make("llama")
    memory = attach(model, session, mode=mode, bias=True)
    return get_peft_model(model, lora(**options)), memory, session


ORDERS = pytest.mark.parametrize("make_both", [lora_first, memory_first])


def open_gates(memory: Memory) -> None:
    """The same random gates in either order."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in memory.gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


@ORDERS
def test_lora_gates_and_tables_are_trained_together(make_both: Callable[..., Made]) -> None:
    """And nothing else; the look-ahead's tickets are found on the way in."""
    model, memory, session = make_both()
    open_gates(memory)
    optimizer = torch.optim.AdamW(memory.parameter_groups(1e-2))
    before, rows = {n: p.clone() for n, p in model.named_parameters()}, contents(session)

    for step, batch in enumerate(memory.look_ahead([{"input_ids": make_tokens()}] * 2)):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        memory.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        memory.commit(step, lr=0.1)

    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert all("lora_" in name or "engram_memory" in name for name in changed)
    assert any("lora_" in name for name in changed)
    assert any("engram_memory" in name for name in changed)
    assert not same_tables(session, rows)
    assert session._announced == 2


def test_either_order_computes_the_same() -> None:
    """Same weights, same losses."""
    losses = []
    for make_both in (lora_first, memory_first):
        model, memory, _ = make_both()
        memory.train_gates()
        open_gates(memory)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        losses.append(loss_of(model, make_tokens()).item())

    assert losses[0] == losses[1]


def test_gates_that_peft_froze_are_trained_again() -> None:
    """At the latest in the first training pass, which says so; a set of its own is left alone."""
    model, memory, _ = memory_first()
    assert not any(p.requires_grad for p in memory.gates.parameters())

    with pytest.warns(RuntimeWarning, match="parameter_groups"):
        loss_of(model, make_tokens()).backward()

    assert all(p.grad is not None for p in memory.gates.parameters())
    memory.skip(0)
    loss_of(model, make_tokens()).backward()  # no second warning

    for ask in (Memory.count_parameters, Memory.train_gates, lambda m: m.parameter_groups(1e-3)):
        model, memory, _ = memory_first()
        ask(memory)
        assert all(p.requires_grad for p in memory.gates.parameters())


@ORDERS
def test_engram_only_freezes_lora_that_is_there_and_not_what_comes_later(
    make_both: Callable[..., Made],
) -> None:
    """Who comes last decides; counts tell adapters and base apart."""
    model, memory, _ = make_both(mode="engram_only")

    counts = memory.count_parameters()

    assert counts.base_trainable == 0
    assert counts.gates_trainable == counts.gates > 0
    assert counts.adapters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert counts.adapters_trainable == (0 if make_both is lora_first else counts.adapters)


@ORDERS
def test_lora_on_all_linear_layers_leaves_the_gates_alone(make_both: Callable[..., Made]) -> None:
    """Their projections are none of the model's."""
    _, memory, _ = make_both(target_modules="all-linear", bias="none")

    assert not any("lora" in name for name, _ in memory.gates.named_modules())


@ORDERS
@pytest.mark.parametrize("bias", ["none", "all"])
def test_peft_saves_its_own_and_nothing_of_the_memory(
    make_both: Callable[..., Made], tmp_path: Path, bias: str
) -> None:
    """A fresh base gets its LoRA back from there, and the memory from its own checkpoint."""
    model, memory, session = make_both(bias=bias)
    open_gates(memory)
    tokens = make_tokens()
    with memory.disabled():
        without = logits(model, tokens)
    with_memory = logits(model, tokens)

    model.save_pretrained(tmp_path / "lora")
    memory.save_pretrained(tmp_path / "memory")

    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert saved
    assert not any("engram" in name for name in [*saved, *get_peft_model_state_dict(model)])
    base = make("llama")
    fresh = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits(fresh, tokens), without)
    loaded = attach(fresh, session, bias=True)
    loaded.load(tmp_path / "memory")
    torch.testing.assert_close(logits(fresh, tokens), with_memory)


@ORDERS
def test_merging_and_disabling_lora_keep_the_memory(make_both: Callable[..., Made]) -> None:
    """What is left of the wrapper is an attached model, gates included."""
    model, memory, _ = make_both()
    open_gates(memory)
    tokens = make_tokens()
    both = logits(model, tokens)
    with model.disable_adapter():
        only_memory = logits(model, tokens)
    with memory.disabled():
        only_lora = logits(model, tokens)

    merged = model.merge_and_unload()

    assert not torch.equal(both, only_memory)
    assert not torch.equal(both, only_lora)
    torch.testing.assert_close(logits(merged, tokens), both)
    assert memories(merged) == {"default": memory}
    assert any("engram_memory" in name for name, _ in merged.named_parameters())
    memory.detach()
    torch.testing.assert_close(logits(merged, tokens), only_lora)
    assert memories(merged) == {}


def test_a_second_adapter_leaves_the_gates_trained() -> None:
    """Adding, choosing and removing adapters is between peft and its layers."""
    model, memory, _ = memory_first()
    memory.train_gates()

    changes: list[Callable[[], Any]] = [
        lambda: model.add_adapter("second", lora()),
        lambda: model.set_adapter("second"),
        lambda: model.delete_adapter("default"),
    ]
    for change in changes:
        change()
        assert all(p.requires_grad for p in memory.gates.parameters())
    open_gates(memory)
    loss_of(model, make_tokens()).backward()
    assert sum(memory.commit(0, lr=1.0).rows.values()) > 0


def test_detaching_under_lora_leaves_pefts_decisions() -> None:
    """The base stays frozen: it was peft, not the memory, that froze it last."""
    plain = get_peft_model(make("llama"), lora())
    model, memory, _ = memory_first(mode="engram_only")

    memory.detach()

    assert flags(model) == flags(plain)


def test_detaching_from_a_peft_model_restores_it() -> None:
    """Attached after LoRA, all flags come back."""
    model: nn.Module = get_peft_model(make("llama"), lora())
    found = flags(model)

    attach(model, make_session()).detach()

    assert flags(model) == found


def test_an_adapter_beside_a_multimodal_wrapper_reaches_the_language_model() -> None:
    """peft around llava around llama."""
    model: Any = get_peft_model(make("llava"), lora())
    memory = attach(model, make_session(), mode="preserve_trainable")
    open_gates(memory)

    loss_of(model, make_tokens().clamp_max(40)).backward()
    applied = memory.commit(0, lr=1.0)

    assert sum(applied.rows.values()) > 0
    assert all(p.grad is not None for p in memory.gates.parameters())
