"""Batches of a Trainer's loaders: announced early, for the right step, whatever makes them."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engram_store_client.trainer.ahead import LoaderAhead
from engram_store_client.trainer.arrivals import Arrivals, Place
from engram_store_client.windows import OpenWindows
from tests.unit.client.tiny import LAYERS, make_session, make_tokens
from tests.unit.trainer_runs import (
    Stream,
    Texts,
    arguments,
    attached,
    make_store,
    make_trainer,
    pad,
    series,
    tables_of,
)

# ---------------------------------------------------------------------- guessed steps


class Loop:
    """A loop that claims batches, over windows of an oracle."""

    def __init__(self, accumulate: int = 1) -> None:
        self.session = make_session()
        self.windows = OpenWindows(self.session)
        self.arrivals = Arrivals(self.windows, lambda: True)
        self.windows.arrivals = self.arrivals
        self.arrivals.accumulate = accumulate
        self.passes: list[Any] = []

    def arrive(self, *, training: bool = True, place: Place | None = None) -> int:
        return self.arrivals.arrive(make_tokens(), None, training=training, place=place)

    def forward(self, ticket: int, *, training: bool = True) -> bool:
        """Whether the window that was announced early served."""
        step = self.windows.step if training else None
        early = self.windows.claim(ticket, training=training, shape=(2, 9))
        window = early or self.windows.announce(make_tokens().numpy(), step)
        assert window.step == step
        assert not window.closed
        if training:
            self.passes.append(window._window)
        else:
            self.windows.release(window)
        return early is not None

    def commit(self) -> None:
        """End the step: it has its passes' windows, in their order, and no others."""
        step = self.windows.step
        self.arrivals.end_step(step)
        assert [w for w in self.open if w.step == step] == self.passes
        self.passes = []
        self.windows.skip(step)

    @property
    def open(self) -> list[Any]:
        """Windows that the session has, in the order of their announcements."""
        return [window for window in self.session._windows if not window.closed]


def run(loop: Loop, sizes: list[int], *, ahead: int = 1) -> list[bool]:
    """Steps of some micro-batches each, over one loader that is ahead of them."""
    tickets: list[int] = []
    hits = []
    for size in sizes:
        for _ in range(size):
            while len(tickets) <= ahead:
                tickets.append(loop.arrive())
            hits.append(loop.forward(tickets.pop(0)))
        loop.commit()
    return hits


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_steps_of_accumulated_batches_are_guessed(ahead: int) -> None:
    """However far ahead the loader is."""
    assert all(run(Loop(3), [3] * 5, ahead=ahead))


def test_a_shorter_step_costs_one_window_at_most_and_teaches_the_rest() -> None:
    """A step ended early: what was announced for it moves on, and later guesses are right."""
    hits = run(Loop(3), [3, 2, 3, 3, 3], ahead=4)

    assert hits[:5] == [True] * 5
    assert sum(hits) >= len(hits) - 1
    assert all(hits[-6:])


def test_a_wrong_number_of_batches_in_a_step_changes_no_order() -> None:
    """Windows of a step are announced in the order of their passes, also after a mistake."""
    loop = Loop(1)  # in truth three
    tickets = [loop.arrive() for _ in range(6)]
    for _ in range(2):
        for _ in range(3):
            loop.forward(tickets.pop(0))
        assert len(loop.passes) == 3
        loop.commit()


def test_batches_that_are_only_read_do_not_count() -> None:
    """Evaluation between and within steps; a wrong guess either way is made good."""
    loop = Loop(2)
    first = [loop.arrive(), loop.arrive(), loop.arrive()]
    read = loop.arrive(training=False)
    wrong = loop.arrive(training=False)

    assert loop.forward(first[0])
    assert loop.forward(read, training=False)
    assert loop.forward(first[1])
    loop.commit()
    assert loop.forward(first[2])
    assert not loop.forward(wrong)  # announced to be read, but trained
    loop.commit()
    mistaken = loop.arrive()
    assert not loop.forward(mistaken, training=False)
    loop.commit()
    assert loop.open == []


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [1, 0, 3, 2, 5, 4], [1, 3, 0, 5, 2, 4]])
def test_batches_of_workers_are_announced_in_turn(order: list[int]) -> None:
    """Two workers: whichever is ready first, batch i comes from worker i modulo 2."""
    loop = Loop(2)
    loop.arrivals.begin_epoch()
    tickets = {i: loop.arrive(place=Place(100 + i % 2, i % 2, 2, i // 2)) for i in order}
    steps = [loop.arrivals._open[tickets[i]].step for i in range(6)]

    assert steps == [0, 0, 1, 1, 2, 2]
    announced = [loop.windows._ahead[tickets[i]]._window for i in range(6)]
    assert loop.open == announced
    loop.arrivals.begin_epoch()  # persistent workers count on, from another worker's turn
    again = loop.arrive(place=Place(100, 0, 2, 3))
    assert loop.arrivals._open[again].step == 0
    assert len(loop.open) == 1


def test_batches_that_arrive_on_another_thread_wait_for_the_one_that_trains() -> None:
    """As they do where memory is pinned: the store is called by one thread only."""
    loop = Loop(2)
    tickets: list[int] = []
    thread = threading.Thread(target=lambda: tickets.extend(loop.arrive() for _ in range(3)))
    thread.start()
    thread.join()
    assert loop.open == []

    assert loop.forward(tickets[0])
    assert len(loop.open) == 3
    assert loop.forward(tickets[1])
    loop.commit()
    assert loop.forward(tickets[2])


# ---------------------------------------------------------------------- a Trainer's loaders

VARIANTS: dict[str, dict[str, Any]] = {
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "as they get ready": {"dataloader_num_workers": 2, "dataloader_in_order": False},
    "by length, all columns": {
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
    },
    "dispatched": {"accelerator_config": {"dispatch_batches": True, "split_batches": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_batch_of_a_loader_is_announced_twice(tmp_path: Path, variant: str) -> None:
    """Two epochs with a shorter last step each, and evaluation in between."""
    extra = VARIANTS[variant]
    args = arguments(
        tmp_path / "run",
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        **extra,
    )
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store)
        trainer = make_trainer(
            memory,
            args,
            train_dataset=Texts(10, lengths=(4, 12)),
            eval_dataset=Texts(5, seed=9),
        )
        trainer.train()

        windows = memory.reader.windows
        assert memory.step == 6  # 5 batches by 2, twice
        assert windows._ahead == {}
        assert windows._training == []
        assert sum(series(trainer, "engram/announced_again")) == 0
        assert windows.guards().gradients_pushed == 10 * len(LAYERS)
        assert store.stats().windows_unused == 0


def test_what_makes_the_batches_makes_no_difference(tmp_path: Path) -> None:
    """With workers, of a stream, without the collator: the same tables, bit for bit."""
    tables = []
    cases: list[tuple[Any, bool, dict[str, Any]]] = [
        (Texts(14), True, {}),
        (Texts(14), False, {"dataloader_num_workers": 2}),
        (Stream(Texts(14)), True, {"accelerator_config": {"dispatch_batches": True}}),
    ]
    for number, (dataset, collated, changes) in enumerate(cases):
        args = arguments(
            tmp_path / str(number),
            max_steps=3,
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
            **changes,
        )
        with make_store(tmp_path / f"{number}.engram") as store:
            memory = attached(store)
            collate = memory.collator(pad) if collated else pad
            trainer = make_trainer(memory, args, train_dataset=dataset, data_collator=collate)
            trainer.train()
            tables.append(tables_of(store))
            assert sum(series(trainer, "engram/announced_again")) == 0
    assert tables[1:] == tables[:1] * 2


@pytest.mark.parametrize(("depth", "expected"), [(0, [4, 4, 3]), (2, [6, 6, 3])])
def test_batches_are_announced_ahead_of_their_step(
    tmp_path: Path, depth: int, expected: list[int]
) -> None:
    """Those of the step under way, the one that Accelerate holds, and as many as were asked for."""
    ahead = []
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store)
        model = memory.model
        windows = memory.reader.windows

        def count(*_: Any) -> None:
            steps = [window.step or 0 for window in windows._ahead.values()]
            ahead.append(sum(step >= windows.step for step in steps))

        model.register_forward_pre_hook(count)
        args = arguments(tmp_path / "run", gradient_accumulation_steps=3)
        callbacks = [memory.callback(look_ahead=depth)]
        make_trainer(memory, args, train_dataset=Texts(18), callbacks=callbacks).train()

    assert ahead == [windows for windows in expected for _ in range(3)]


def test_an_error_of_a_loader_comes_in_its_turn() -> None:
    """Not before the good batches ahead of it; everything else is the loader's."""

    def batches() -> Iterator[int]:
        yield from range(4)
        raise OSError("gone")

    class Loader(list[int]):
        batch_size = 7

        def __iter__(self) -> Iterator[int]:
            return batches()

    ahead = LoaderAhead(Loader([1, 2]), 2)
    handed_out = iter(ahead)

    assert [next(handed_out) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="gone"):
        next(handed_out)
    assert len(ahead) == 2
    assert ahead.batch_size == 7
    assert list(LoaderAhead([], 2)) == []


def test_predictions_outside_of_training_only_read(tmp_path: Path) -> None:
    """`evaluate` and `predict` before and after training change no table."""
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store)
        trainer = make_trainer(memory, arguments(tmp_path), eval_dataset=Texts(6))
        before = tables_of(store)
        first = trainer.evaluate()
        predicted = trainer.predict(Texts(6))
        assert tables_of(store) == before
        assert memory.reader.windows._ahead == {}
        trainer.train()
        after = trainer.evaluate()

    assert predicted.metrics is not None
    assert first["eval_loss"] == predicted.metrics["test_loss"] > after["eval_loss"]
