"""Several memories on one model, by name."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engram_store.errors import ConfigError, ProtocolError
from engram_store.testing import MemorySession
from engram_store_client import Memory, attach, memories, set_active
from tests.unit.client.models import flags, logits, shape_of
from tests.unit.client.tiny import (
    assert_same,
    contents,
    llama,
    loss_of,
    loss_of_batch,
    make_session,
    make_tokens,
    same_tables,
    scramble,
)


def two(**options: Any) -> tuple[nn.Module, Memory, Memory]:
    """A llama with two memories; the stores have the same rows, the gates have not."""
    model = llama()
    prose = attach(model, make_session(), name="prose", **options)
    code = attach(model, make_session(), name="code", **options)
    scramble(prose, seed=5)
    scramble(code, seed=6)
    return model, prose, code


def session_of(memory: Memory) -> MemorySession:
    assert isinstance(memory.session, MemorySession)
    return memory.session


@cache
def alone(seed: int) -> Tensor:
    """Logits of a llama with one memory whose gates are those of a seed; negative: with none."""
    model = llama()
    if seed >= 0:
        scramble(attach(model, make_session()), seed=seed)
    return logits(model, make_tokens())


def test_memories_are_found_by_name_and_their_gates_in_the_model() -> None:
    """From any wrapper."""
    model, prose, code = two()

    assert memories(model) == memories(nn.Sequential(model)) == {"prose": prose, "code": code}
    assert memories(llama()) == {}
    parts = {
        ".".join(n.split(".")[:3]) for n in model.state_dict() if n.startswith("engram_memory")
    }
    assert parts == {f"engram_memory.{name}.{n}" for name in ("prose", "code") for n in (0, 2)}


def test_switching_is_exact() -> None:
    """One active memory computes what it computes alone; none, what the model does."""
    model, prose, code = two()
    tokens = make_tokens()

    set_active(model, "prose")
    assert torch.equal(logits(model, tokens), alone(5))
    set_active(model, ["code"])
    assert torch.equal(logits(model, tokens), alone(6))
    with code.disabled():
        assert torch.equal(logits(model, tokens), alone(-1))
    assert code.enabled
    set_active(model, [])
    assert torch.equal(logits(model, tokens), alone(-1))
    prose.enabled = True
    assert torch.equal(logits(model, tokens), alone(5))


def test_memories_that_are_combined_are_added_up_with_their_scales() -> None:
    """Each sees the hidden states without the other, so the order of attaching changes nothing."""
    model, prose, code = two(layers=[2])
    tokens = make_tokens()
    last = model.get_submodule("model.layers.2")
    seen: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))

    for active in ([], ["prose"], ["code"], {"prose": 0.5, "code": -2.0}):
        set_active(model, active)
        logits(model, tokens)

    hidden, first, second, both = seen
    expected = hidden + 0.5 * (first - hidden) - 2.0 * (second - hidden)
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)
    assert (prose.scale, code.scale) == (0.5, -2.0)


def test_memories_that_are_not_active_neither_announce_nor_read() -> None:
    """Not even for batches of their look-ahead."""
    model, prose, code = two()
    set_active(model, "prose")

    for step, batch in enumerate(code.look_ahead(prose.look_ahead([{"input_ids": make_tokens()}]))):
        assert set(batch) == {"input_ids", prose.ticket_key}
        loss_of_batch(model, batch).backward()
        prose.commit(step, lr=1.0)

    assert session_of(prose)._announced == 1
    assert session_of(code)._announced == 0
    set_active(model, [])
    model(inputs_embeds=torch.zeros(1, 2, 32))  # nobody asks for ids


def test_a_window_announced_before_its_memory_was_disabled_is_given_back() -> None:
    """A commit does not miss its gradient."""
    model, prose, code = two()
    (batch,) = code.look_ahead([{"input_ids": make_tokens()}])

    with code.disabled():
        loss_of_batch(model, batch).backward()
    applied = code.commit(0, lr=1.0)
    prose.commit(0, lr=1.0)

    assert set(applied.rows.values()) == {0}
    assert session_of(code)._windows == []


def test_training_two_at_once_is_training_both() -> None:
    """One backward pass, a commit each; nested look-aheads do not mix their tickets up."""
    batches = [{"input_ids": make_tokens(seed=seed)} for seed in range(3)]

    def train(*, ahead: bool) -> list[MemorySession]:
        model, prose, code = two()
        loader: Any = code.look_ahead(prose.look_ahead(batches, 2), 1) if ahead else batches
        for step, batch in enumerate(loader):
            loss_of_batch(model, batch).backward()
            prose.commit(step, lr=0.5)
            code.commit(step, lr=0.5)
        return [session_of(prose), session_of(code)]

    plain, ahead = train(ahead=False), train(ahead=True)

    assert [session._announced for session in plain + ahead] == [3] * 4
    assert not same_tables(plain[0], contents(make_session()))
    assert not same_tables(plain[1], contents(plain[0]))
    for ours, theirs in zip(ahead, plain, strict=True):
        assert_same(contents(ours), contents(theirs))


def test_one_is_trained_while_another_only_helps() -> None:
    """Gates of the other are frozen by the user; its tables are not committed."""
    model, prose, code = two()
    prose.gates.requires_grad_(requires_grad=False)
    before = {n: t.clone() for n, t in prose.gates.state_dict().items()}
    optimizer = torch.optim.SGD(code.parameter_groups(0.1))

    loss_of(model, make_tokens()).backward()
    optimizer.step()
    prose.skip(0)
    code.commit(0, lr=0.1)

    assert all(torch.equal(before[n], t) for n, t in prose.gates.state_dict().items())
    assert same_tables(session_of(prose), contents(make_session()))
    assert not same_tables(session_of(code), contents(make_session()))


def test_a_second_memory_that_preserves_flags_keeps_those_of_the_first() -> None:
    """It does not set free what the first one froze."""
    model = llama()
    found = flags(model)
    first = attach(model, make_session(), name="first")
    second = attach(model, make_session(), name="second", mode="preserve_trainable")

    assert not any(flags(model)[parameter] for parameter in found)
    first.detach()
    second.detach()
    assert flags(model) == found


@pytest.mark.parametrize("first", ["prose", "code"])
def test_detaching_one_leaves_the_other(first: str) -> None:
    """The last one takes everything with it: the model is what it was."""
    plain = llama()
    shape, found = shape_of(plain), flags(plain)
    model, prose, code = two()
    there = {"prose": (prose, 5), "code": (code, 6)}
    gone, _ = there.pop(first)
    ((name, (stays, seed)),) = there.items()

    gone.detach()

    assert memories(model) == {name: stays}
    assert torch.equal(logits(model, make_tokens()), alone(seed))
    assert not any(flags(model)[parameter] for parameter in found)
    loss_of(model, make_tokens()).backward()
    stays.commit(0, lr=1.0)
    stays.detach()
    assert shape_of(model) == shape
    with pytest.raises(ProtocolError, match="attach again"):
        gone.set_mode("full")


def test_layers_may_differ_between_memories() -> None:
    """Hooks of a layer go with the last memory that reads there."""
    model = llama()
    early = attach(model, make_session(), name="early", layers=[0])
    late = attach(model, make_session(), name="late", layers=[2])
    scramble(early)
    scramble(late)
    both = logits(model, make_tokens())

    early.detach()

    hooked = [len(model.get_submodule(f"model.layers.{n}")._forward_pre_hooks) for n in range(3)]
    assert hooked == [0, 0, 1]
    assert not torch.equal(logits(model, make_tokens()), both)


def test_gradient_checkpointing_runs_every_memory_again_with_its_scale() -> None:
    """Whatever is switched between the forward and the backward pass."""

    def gradients(*, checkpointing: bool) -> dict[str, Tensor]:
        model, prose, code = two()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()  # type: ignore[operator]
        set_active(model, {"prose": 0.5, "code": 2.0})
        loss = loss_of(model, make_tokens())
        set_active(model, {"prose": 3.0})
        loss.backward()
        prose.commit(0, lr=1.0)
        code.commit(0, lr=1.0)
        moved = contents(session_of(code))[0] - contents(make_session())[0]
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {**named, "rows": torch.from_numpy(moved)}

    plain, again = gradients(checkpointing=False), gradients(checkpointing=True)

    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)
    assert np.abs(plain["rows"].numpy()).max() > 0


def test_a_failing_memory_leaves_no_window_of_the_others_behind() -> None:
    """The pass did not come about, so nobody owes a gradient."""
    model, prose, code = two()
    session_of(code).close()

    with pytest.raises(ProtocolError):
        loss_of(model, make_tokens())

    assert all(window.closed for window in session_of(prose)._windows)
    assert set(prose.commit(0, lr=1.0).rows.values()) == {0}


def test_unknown_names_change_nothing() -> None:
    """The message says which there are."""
    model, prose, code = two()
    set_active(model, "code")

    with pytest.raises(ConfigError, match=r"'verse'.*'prose', 'code'"):
        set_active(model, ["prose", "verse"])

    assert (prose.enabled, code.enabled) == (False, True)
    with pytest.raises(ConfigError, match="none"):
        set_active(llama(), "prose")
