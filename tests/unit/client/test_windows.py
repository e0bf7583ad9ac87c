"""Windows over a training loop: look-ahead, evaluation, clipping, the control arm."""

import copy
import errno
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engram_store.errors import (
    ConfigError,
    DiskFullError,
    InputError,
    MissingGradientError,
    ProtocolError,
)
from engram_store.session import Applied
from engram_store.testing import MemorySession
from engram_store.types import OptimizerKind
from engram_store_client import Memory, attach
from tests.unit.client.tiny import (
    LAYERS,
    Tables,
    assert_same,
    contents,
    llama,
    loss_of,
    loss_of_batch,
    make_session,
    make_tokens,
    one_batch,
    same_tables,
    scramble,
    trained,
)


@pytest.mark.parametrize("depth", [0, 1, 3, 9])
def test_look_ahead_trains_the_same_whatever_its_depth(depth: int) -> None:
    """Tables after four steps are those of a loop without look-ahead, bit for bit."""
    batches = [{"input_ids": make_tokens(seed=s)} for s in range(4)]

    def run(wrap: Callable[[Memory], Any]) -> Tables:
        model, session = llama(), make_session(optimizer=OptimizerKind.ADAM)
        memory = attach(model, session)
        scramble(memory)
        for step, batch in enumerate(wrap(memory)):
            assert memory.step == step
            loss_of_batch(model, batch).backward()
            memory.commit(step, lr=0.1)
        assert session._windows == []
        return contents(session)

    plain = run(lambda _: iter(batches))
    ahead = run(lambda memory: memory.look_ahead(batches, depth))
    for number in LAYERS:
        np.testing.assert_array_equal(ahead[number], plain[number])
    assert all("engram_window" not in batch for batch in batches)


def test_leaving_a_loop_early_leaves_no_window_behind() -> None:
    """The batch that was handed out but not used is not missed by the next commit."""
    model, session = llama(), make_session()
    memory = attach(model, session)
    scramble(memory)
    batches = [{"input_ids": make_tokens(seed=s)} for s in range(6)]

    for step, batch in enumerate(memory.look_ahead(batches)):
        if step == 2:
            break
        loss_of_batch(model, batch).backward()
        memory.commit(step, lr=0.1)
    for batch in memory.look_ahead(batches[:1]):
        loss_of_batch(model, batch).backward()
        memory.commit(memory.step, lr=0.1)

    assert session.step == 3
    assert session._windows == []


def test_look_ahead_refuses_what_makes_no_sense() -> None:
    """At the call, not at the first batch; nothing is announced."""
    memory = attach(llama(), make_session())

    with pytest.raises(ConfigError, match="accumulate"):
        memory.look_ahead([], accumulate=0)
    with pytest.raises(ConfigError, match="depth"):
        memory.look_ahead([], -1)
    with pytest.raises(InputError, match="labels"):
        next(memory.look_ahead([{"labels": make_tokens()}]))


def test_a_training_window_without_a_backward_pass_is_not_silently_committed() -> None:
    """`skip` is how a step is left out on purpose."""
    model, session = llama(), make_session()
    memory, before = attach(model, session), contents(session)
    loss_of(model, make_tokens())
    with pytest.raises(MissingGradientError):
        memory.commit(0, lr=1.0)

    applied = memory.skip(0)

    assert set(applied.rows.values()) == {0}
    assert session.step == 1
    assert same_tables(session, before)


def no_grad_in_training(model: nn.Module, memory: Memory) -> None:
    model.train()
    with torch.no_grad():
        model(make_tokens())


def evaluation(model: nn.Module, memory: Memory) -> None:
    model.eval()
    model(make_tokens())


def evaluation_ahead(model: nn.Module, memory: Memory) -> None:
    model.eval()
    for batch in memory.look_ahead(
        [{"input_ids": make_tokens(seed=s)} for s in range(3)], train=False
    ):
        model(**batch)


@pytest.mark.parametrize("run", [no_grad_in_training, evaluation, evaluation_ahead])
def test_evaluation_pushes_and_changes_nothing(run: Callable[[nn.Module, Memory], None]) -> None:
    """No window stays open, no step is counted."""
    model, session = llama(), make_session()
    memory, before = attach(model, session), contents(session)

    run(model, memory)

    assert same_tables(session, before)
    assert session.step == 0
    assert session._windows == []
    assert memory._windows._ahead == {}
    assert memory.guards().gradients_pushed == 0


def test_evaluation_between_the_micro_batches_of_a_step_changes_no_result() -> None:
    """Read-only windows and training windows do not get mixed up."""

    def interrupted(model: nn.Module, memory: Memory) -> None:
        loss = loss_of(model, make_tokens())
        evaluation(model, memory)
        model.train()
        loss.backward()

    assert_same(trained(interrupted), trained(one_batch))


def test_a_ticket_is_taken_by_the_pass_it_came_with_only() -> None:
    """A failed pass does not leave its ticket to the next one; a used-up one says nothing."""
    model, session = llama(), make_session()
    memory = attach(model, session)
    (batch,) = memory.look_ahead([{"input_ids": make_tokens()}])
    with pytest.raises(ValueError, match="exactly one"):
        model(**batch, inputs_embeds=torch.zeros(2, 9, 32))

    loss_of_batch(model, batch).backward()
    memory.commit(0, lr=0.1)

    assert memory.reader.windows.announced_again == 0
    loss_of_batch(model, batch).backward()  # announced on the spot, for the step it is in now
    assert memory.reader.windows.announced_again == 1
    memory.commit(1, lr=0.1)
    with pytest.raises(InputError, match="token id"):
        model(inputs_embeds=torch.zeros(2, 9, 32))
    with pytest.raises(ProtocolError, match="outside of the model's forward pass"):
        model.get_submodule("model.layers.0")(torch.zeros(2, 9, 32))


def test_a_layer_that_runs_alone_is_never_given_the_rows_of_some_window() -> None:
    """With several windows waiting it must be clear which one is run again."""
    model = llama()
    attach(model, make_session())
    hidden = torch.zeros(2, 9, 32)
    passes = [loss_of(model, make_tokens(seed=seed)) for seed in range(2)]

    with pytest.raises(ProtocolError, match="which of the open windows"):
        model.get_submodule("model.layers.0")(hidden)
    sum(passes).backward()


def test_a_batch_of_another_shape_than_its_window_gets_its_own() -> None:
    """Rows are never matched with other tokens by broadcasting, and no window is left over."""
    shorter = make_tokens()[:, :8]

    def cut(model: nn.Module, memory: Memory) -> None:
        (batch,) = memory.look_ahead([{"input_ids": make_tokens()}])
        loss_of_batch(model, {**batch, "input_ids": shorter}).backward()

    assert_same(trained(cut), trained(lambda model, _: loss_of(model, shorter).backward()))


@pytest.mark.parametrize("max_norm", [1e-2, 1e6])
def test_clipping_uses_one_norm_and_one_coefficient_for_dense_and_tables(max_norm: float) -> None:
    """The norm is that of all gradients together; without need nothing is scaled."""
    model, session = llama(), make_session()
    memory = attach(model, session)
    scramble(memory)
    loss_of(model, make_tokens()).backward()
    unclipped = trained(one_batch)
    before = contents(session)
    dense = {n: p.grad.clone() for n, p in memory.gates.named_parameters() if p.grad is not None}
    squares = sum(float(g.square().sum()) for g in dense.values())
    squares += sum(float(np.square(before[n] - unclipped[n]).sum()) for n in LAYERS)

    total = memory.clip_grad_norm_(model.parameters(), max_norm)
    memory.commit(0, lr=1.0)

    coefficient = min(1.0, max_norm / (squares**0.5 + 1e-6))
    assert float(total) == pytest.approx(squares**0.5, rel=1e-5)
    for name, parameter in memory.gates.named_parameters():
        torch.testing.assert_close(parameter.grad, dense[name] * coefficient)
    for number in LAYERS:
        moved = before[number] - session.contents[number].rows
        expected = (before[number] - unclipped[number]) * coefficient
        np.testing.assert_allclose(moved, expected, atol=2e-7)


def test_clipping_counts_for_one_step_only() -> None:
    """The next step starts with a coefficient of 1."""
    model = llama()
    memory = attach(model, make_session())
    scramble(memory)
    for step in range(2):
        loss_of(model, make_tokens()).backward()
        if step == 0:
            memory.clip_grad_norm_(model.parameters(), 1e-3)
            assert memory._windows.clip_scale < 1
        memory.commit(step, lr=0.1)
        assert memory._windows.clip_scale == 1.0


def test_the_control_arm_trains_gates_and_never_a_table() -> None:
    """Its steps count, its rows are zeros, and the store sees only reads."""
    model, session = llama(), make_session()
    memory, before = attach(model, session, zero_table=True), contents(session)
    scramble(memory)
    weights = copy.deepcopy(memory.gates.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    batches = [{"input_ids": make_tokens(seed=s)} for s in range(3)]
    for step, batch in enumerate(memory.look_ahead(batches)):
        loss_of_batch(model, batch).backward()
        memory.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        memory.commit(step, lr=1.0)

    assert memory.step == 3
    assert session.step == 0
    assert same_tables(session, before)
    assert memory.guards().gradients_pushed == memory.guards().backward_calls == 0
    # Without biases zero rows gate a zero value: the control is the base model.
    assert all(torch.equal(weights[n], w) for n, w in memory.gates.state_dict().items())


def test_rows_and_value_projection_that_are_both_zero_are_reported() -> None:
    """Neither can ever get a gradient; nothing else would tell."""
    model, session = llama(), make_session()
    memory = attach(model, MemorySession(session.recipe, session.tables), identity_init=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step() -> None:
        loss_of(model, make_tokens()).backward()
        optimizer.step()
        memory.commit(memory.step, lr=1.0)

    step()
    with pytest.warns(RuntimeWarning, match="random initial rows"):
        step()
    step()
    assert memory.guards().zero_gradients == 3 * len(LAYERS)


def test_guards_tell_a_dead_table_from_one_that_learns() -> None:
    """A value projection of zero gives zero gradients at first; a trained one does not."""
    model, session = llama(), make_session()
    memory = attach(model, session, identity_init=True)
    for step in range(2):
        loss_of(model, make_tokens()).backward()
        memory.commit(step, lr=0.1)
        if step == 0:
            assert memory.guards().zero_gradients == len(LAYERS)
            scramble(memory)

    guards = memory.guards()

    assert guards.zero_gradients == len(LAYERS)
    assert guards.backward_calls == guards.gradients_pushed == 2 * len(LAYERS)
    rows = sum(len(np.unique(session.recipe.rows(n, make_tokens().numpy()))) for n in LAYERS)
    assert guards.rows_pushed == 2 * rows


# ---------------------------------------------------------------------- commits under way


class FailingOnce(MemorySession):
    """Its first commit that is begun fails in the background, when it is told to."""

    def __init__(self, like: MemorySession) -> None:
        super().__init__(like.recipe, like.tables, {n: t.rows for n, t in like.contents.items()})
        self.begun: Future[Applied] = Future()
        self.failed = False

    def begin_commit(self, step: int, lr: Any, **more: Any) -> "Future[Applied]":
        if self.failed:
            return super().begin_commit(step, lr, **more)
        self.failed = True
        return self.begun

    def fail(self) -> None:
        """Close the windows of the next step, as a store that gave them rows does."""
        for window in self._windows:
            if window.step == self.step + 1:
                window.close()
        self.begun.set_exception(DiskFullError(errno.ENOSPC, "no room"))


def begun(max_norm: float | None = None) -> tuple[nn.Module, Memory, FailingOnce]:
    """A model whose first commit is under way."""
    model, session = llama(), FailingOnce(make_session())
    memory = attach(model, session)
    scramble(memory)
    loss_of(model, make_tokens()).backward()
    if max_norm is not None:
        memory.clip_grad_norm_(model.parameters(), max_norm)
    assert memory.commit(0, lr=1.0, wait=False) is None
    return model, memory, session


def test_a_commit_in_the_background_is_finished_by_the_next_call() -> None:
    """Windows are forgotten then, and `finish_commit` tells what it did, once."""
    model, session = llama(), make_session()
    memory = attach(model, session)
    scramble(memory)
    for step in range(3):
        loss_of(model, make_tokens(seed=step)).backward()
        assert memory.commit(step, lr=0.1, wait=False) is None
        assert memory.step == step + 1
    applied = memory.finish_commit()
    assert applied is not None
    assert applied.step == 2
    assert memory.finish_commit() is None
    assert memory._windows._training == []
    assert memory.guards().gradients_pushed == 3 * len(LAYERS)


CALLS: dict[str, Callable[[nn.Module, Memory, Path], object]] = {
    "commit": lambda _, memory, __: memory.commit(1, lr=1.0),
    "begin": lambda _, memory, __: memory.commit(1, lr=1.0, wait=False),
    "skip": lambda _, memory, __: memory.skip(1),
    "norm": lambda model, memory, __: memory.clip_grad_norm_(model.parameters(), 1.0),
    "finish": lambda _, memory, __: memory.finish_commit(),
    "forward": lambda model, _, __: loss_of(model, make_tokens()),
    "look ahead": lambda _, memory, __: next(memory.look_ahead([{"input_ids": make_tokens()}])),
    "save": lambda _, memory, path: memory.save_pretrained(path),
    "load": lambda _, memory, path: memory.load(path),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_why_a_commit_failed_is_raised_by_the_next_call_and_only_there(
    tmp_path: Path, call: Callable[[nn.Module, Memory, Path], object]
) -> None:
    """Whatever that is; then the step can be committed again, clipped as it was."""
    unclipped = trained(one_batch)
    model, memory, session = begun(max_norm=1e-2)
    before = contents(session)
    session.fail()

    with pytest.raises(DiskFullError, match="no room"):
        call(model, memory, tmp_path)

    assert same_tables(session, before)
    assert memory.finish_commit() is None
    assert memory._windows.clip_scale < 1
    assert memory.step == 0
    assert set(memory.commit(0, lr=1.0).rows.values()) != {0}
    assert memory._windows.clip_scale == 1
    for number in LAYERS:
        moved = np.abs(before[number] - session.contents[number].rows).max()
        assert 0 < moved < np.abs(before[number] - unclipped[number]).max()


def test_rows_that_came_to_nothing_are_not_trained() -> None:
    """The pass that saw them has to be run again; those of later steps stay announced."""
    model, memory, session = begun()
    batches = [{"input_ids": make_tokens(seed=s)} for s in range(2)]
    session.step = 1  # as a session says while a commit is under way
    ahead = memory.look_ahead(batches, depth=1)
    batch = next(ahead)
    loss_of_batch(model, batch).backward()
    session.step = 0
    session.fail()

    with pytest.raises(DiskFullError):
        memory.commit(1, lr=1.0)
    memory.commit(0, lr=1.0)
    loss_of_batch(model, batch).backward()
    assert memory.reader.windows.announced_again == 1
    memory.commit(1, lr=1.0)
    loss_of_batch(model, next(ahead)).backward()
    memory.commit(2, lr=1.0)

    assert session.step == 3


def test_detaching_waits_for_a_commit_and_says_why_it_failed() -> None:
    model, memory, session = begun()
    session.fail()
    with pytest.raises(DiskFullError):
        memory.detach()
    memory.detach()
    assert "engram_memory" not in dict(model.named_children())
    assert all(window.closed for window in session._windows)


def test_the_control_arm_commits_in_the_background_what_it_commits() -> None:
    memory = attach(llama(), make_session(), zero_table=True)
    assert memory.commit(0, lr=1.0, wait=False) is None
    assert memory.step == 1
    assert memory.finish_commit() is None
