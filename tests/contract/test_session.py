"""What every session promises, whichever way the store is reached.

A transport joins by adding one maker to `MAKERS`. Nothing here looks behind `session.Session`;
what a store holds is seen through windows, as a trainer sees it.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.errors import (
    ConfigError,
    DtypeError,
    DuplicateStepError,
    MissingGradientError,
    NonFiniteGradientError,
    ProtocolError,
    ReadOnlyError,
    ShapeError,
    SnapshotMismatchError,
    StepGapError,
    StoreClosedError,
    TokenRangeError,
    UnknownLayerError,
    WindowClosedError,
)
from engram_store.recipes import Recipe
from engram_store.session import Applied, Session, Window
from engram_store.types import RowBlock, TokenIds
from engram_store_client.transport import connect
from tests.pairs import (
    DIM,
    INITIAL,
    VOCABULARY,
    Pair,
    TwinWindow,
    make_oracle,
    random_tokens,
)
from tests.servers import serving

SessionMaker = Callable[[Path, Recipe, dict[str, Any]], AbstractContextManager[Session]]
"""Given a directory of its own, a recipe and settings of `engram_store.create`."""
Make = Callable[..., Session]
MakeBoth = Callable[..., Pair]


@contextlib.contextmanager
def memory(_directory: Path, recipe: Recipe, settings: dict[str, Any]) -> Iterator[Session]:
    yield make_oracle(recipe, INITIAL, **settings)


@contextlib.contextmanager
def embedded(directory: Path, recipe: Recipe, settings: dict[str, Any]) -> Iterator[Session]:
    path = directory / "store.engram"
    engram_store.create(path, recipe, **{"dim": DIM, "initial": INITIAL, **settings})
    with engram_store.open(path, "train") as store:
        yield store


@contextlib.contextmanager
def over_unix_socket(
    directory: Path, recipe: Recipe, settings: dict[str, Any]
) -> Iterator[Session]:
    with (
        # A socket's path has at most 107 bytes.
        tempfile.TemporaryDirectory() as short,
        remote(directory, recipe, settings, f"unix:{short}/store.sock") as session,
    ):
        yield session


@contextlib.contextmanager
def over_tcp(directory: Path, recipe: Recipe, settings: dict[str, Any]) -> Iterator[Session]:
    with remote(directory, recipe, settings, "tcp:") as session:
        yield session


@contextlib.contextmanager
def remote(
    directory: Path, recipe: Recipe, settings: dict[str, Any], address: str
) -> Iterator[Session]:
    path = directory / "store.engram"
    engram_store.create(path, recipe, **{"dim": DIM, "initial": INITIAL, **settings})
    with (
        engram_store.open(path, "train") as store,
        serving(store, address) as served,
        connect(served, deadline_seconds=30, work_seconds=60) as session,
    ):
        yield session


MAKERS: list[SessionMaker] = [memory, embedded, over_unix_socket, over_tcp]


@pytest.fixture(params=MAKERS, ids=lambda maker: maker.__name__)
def make(request: pytest.FixtureRequest, tmp_path: Path, recipe: Recipe) -> Iterator[Make]:
    """Makes sessions that differ in nothing but how they are reached."""
    with contextlib.ExitStack() as stack:
        count = 0

        def make_session(**settings: Any) -> Session:
            nonlocal count
            count += 1
            maker: SessionMaker = request.param
            return stack.enter_context(maker(tmp_path / f"session-{count}", recipe, settings))

        yield make_session


@pytest.fixture
def both(make: Make, recipe: Recipe) -> MakeBoth:
    """A session, and the oracle with the same rows."""

    def make_both(**settings: Any) -> Pair:
        return Pair(make(**settings), make_oracle(recipe, INITIAL, **settings))

    return make_both


@pytest.fixture
def session(make: Make) -> Session:
    return make()


@pytest.fixture
def tokens() -> TokenIds:
    return random_tokens(np.random.default_rng(1), (2, 12))


def ones_for(window: Window, layer: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ones((window.row_ids(layer).size, DIM), np.float32)


def push_ones(session: Session, window: Window) -> None:
    for layer in session.tables:
        window.push(layer, ones_for(window, layer))


def train_once(session: Session, tokens: TokenIds) -> None:
    window = session.announce(tokens, session.step)
    push_ones(session, window)
    session.commit(session.step, 0.1)


def seen(session: Session, tokens: TokenIds, layer: int = 1) -> RowBlock:
    """Rows that some tokens look up, as a window announced now reads them."""
    with session.announce(tokens) as window:
        return window.rows(layer)[0].copy()


# ---------------------------------------------------------------------- windows


def test_a_window_holds_each_row_once_in_order_of_first_look_up(
    session: Session, tokens: TokenIds, recipe: Recipe
) -> None:
    """`row_ids[inverse]` are the recipe's look-ups, and new rows appear in ascending places."""
    window = session.announce(tokens)
    for layer, spec in session.tables.items():
        rows, inverse = window.rows(layer)
        ids = window.row_ids(layer)

        assert rows.shape == (ids.size, DIM)
        assert rows.dtype == spec.dtype.storage
        assert inverse.dtype == ids.dtype == np.int32
        assert inverse.shape == (2, 12, recipe.columns)
        np.testing.assert_array_equal(ids[inverse], recipe.rows(layer, tokens))
        assert np.unique(ids).size == ids.size
        _, first = np.unique(inverse, return_index=True)
        assert (np.diff(first) > 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_come_in_the_storage_dtype(both: MakeBoth, dtype: str, tokens: TokenIds) -> None:
    """bfloat16 as the bits in uint16; initial rows are those of `Normal`."""
    pair = both(dtype=dtype)
    window = pair.announce(tokens)
    for layer in pair.session.tables:
        assert window.rows(layer).any()


def test_a_carried_context_reads_the_rows_of_one_long_window(
    session: Session, recipe: Recipe
) -> None:
    """A sequence may be cut anywhere if `recipe.carry` is handed on."""
    tokens = random_tokens(np.random.default_rng(5), (2, 20))
    whole = session.announce(tokens)
    rest = session.announce(tokens[:, 8:], context=recipe.carry(tokens[:, :8]))
    for layer in session.tables:
        rows, inverse = whole.rows(layer)
        piece, piece_inverse = rest.rows(layer)
        np.testing.assert_array_equal(piece[piece_inverse], rows[inverse[:, 8:]])


def test_a_window_without_tokens_is_fine(both: MakeBoth) -> None:
    """It has no rows, takes an empty gradient, and its step is a step."""
    pair = both()
    window = pair.announce(np.empty((2, 0), np.int64), 0)
    window.push_random(pair.rng)

    applied = pair.commit()

    assert set(applied.rows.values()) == {0}
    assert pair.step == 1


def test_the_tokens_of_a_window_belong_to_the_caller(session: Session) -> None:
    """They may be overwritten right after `announce`."""
    tokens = random_tokens(np.random.default_rng(2), (4, 100))
    expected = session.announce(tokens.copy()).row_ids(1).copy()

    window = session.announce(tokens)
    tokens[:] = 3

    np.testing.assert_array_equal(window.row_ids(1), expected)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (
            np.array([[0, VOCABULARY]]),
            TokenRangeError,
            r"token id 500 at position \(0, 1\) .*below 500",
        ),
        (
            np.array([[1, 2, 3], [4, 5, 900]], np.int32),
            TokenRangeError,
            r"token id 900 at position \(1, 2\)",
        ),
        (np.array([1, 2, 3]), ShapeError, r"shape \(3,\), expected"),
        (np.array([[1.0, 2.0]]), DtypeError, "float64"),
    ],
)
def test_tokens_that_cannot_be_hashed_are_refused_when_announced(
    session: Session, tokens: TokenIds, error: type[Exception], message: str
) -> None:
    """The message names the token and what is allowed, and the next step works."""
    with pytest.raises(error, match=message):
        session.announce(tokens, 0)

    train_once(session, np.array([[1, 2, 3]]))
    assert session.step == 1


def test_an_unknown_layer_is_named_with_the_known_ones(session: Session, tokens: TokenIds) -> None:
    window = session.announce(tokens, 0)
    for call in (
        lambda: window.rows(7),
        lambda: window.row_ids(7),
        lambda: window.push(7, np.zeros((1, DIM), np.float32)),
    ):
        with pytest.raises(UnknownLayerError, match=r"layer 7; this store has layers \[1, 2\]"):
            call()
    push_ones(session, window)
    session.commit(0, 0.1)


def test_a_closed_window_gives_nothing_and_takes_nothing(
    session: Session, tokens: TokenIds
) -> None:
    """By `close`, which may be repeated, and by its step's commit."""
    closed = session.announce(tokens, 0)
    closed.close()
    closed.close()
    committed = session.announce(tokens, 0)
    push_ones(session, committed)
    session.commit(0, 0.1)

    for window in (closed, committed):
        with pytest.raises(WindowClosedError, match="announce it again"):
            window.rows(1)
        with pytest.raises(WindowClosedError, match="announce it again"):
            window.push(1, np.ones((1, DIM), np.float32))


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
def test_training_equals_the_oracle_bit_for_bit(both: MakeBoth, optimizer: str) -> None:
    """Rows, inverse and `Applied`, with two windows a step that share rows."""
    pair = both(optimizer=optimizer)
    pair.train(4)
    window = pair.announce(random_tokens(pair.rng, (8, 200)))
    for layer in pair.session.tables:
        window.rows(layer)


def test_only_looked_up_rows_change_and_all_of_them_do(both: MakeBoth) -> None:
    """With plain SGD in float32, where every gradient of one shows."""
    pair = both(dtype="float32", optimizer="sgd")
    session = pair.session
    everything = random_tokens(pair.rng, (8, 200))
    tokens = everything[:1, :10]
    before = {}
    with session.announce(everything) as window:
        for layer in session.tables:
            before[layer] = window.row_ids(layer).copy(), window.rows(layer)[0].copy()

    train_once(session, tokens)

    trained = session.announce(tokens)
    with session.announce(everything) as window:
        for layer in session.tables:
            ids, old = before[layer]
            changed = (window.rows(layer)[0] != old).any(axis=1)
            np.testing.assert_array_equal(changed, np.isin(ids, trained.row_ids(layer)))


def test_windows_that_are_only_read_change_nothing(session: Session, tokens: TokenIds) -> None:
    """Neither rows nor the step, whether they are closed or not."""
    before = seen(session, tokens)
    session.announce(tokens).rows(1)
    session.announce(tokens).rows(2)

    np.testing.assert_array_equal(seen(session, tokens), before)
    assert session.step == 0


def test_a_step_without_windows_is_a_step(both: MakeBoth) -> None:
    """It changes no row."""
    pair = both()
    applied = pair.commit()
    assert set(applied.rows.values()) == {0}
    assert pair.step == 1
    pair.train(1)


def test_gradients_of_shared_rows_are_summed(make: Make, tokens: TokenIds) -> None:
    """The same window twice is the window once with twice the gradient."""
    twice, once = (make(dtype="float32", optimizer="sgd") for _ in range(2))
    for window in [twice.announce(tokens, 0), twice.announce(tokens, 0)]:
        push_ones(twice, window)
    window = once.announce(tokens, 0)
    for layer in once.tables:
        window.push(layer, 2 * ones_for(window, layer))

    assert twice.commit(0, 0.1) == once.commit(0, 0.1)

    np.testing.assert_array_equal(seen(twice, tokens), seen(once, tokens))


def test_bfloat16_gradients_are_their_float32_values(make: Make, tokens: TokenIds) -> None:
    """Also when windows of both kinds are summed."""
    narrow, wide = make(), make()
    bits = np.uint16(0x3FA0)
    for session, value in ((narrow, bits), (wide, np.float32(1.25))):
        for gradient in (value, np.float32(0.3)):
            window = session.announce(tokens, 0)
            for layer in session.tables:
                window.push(layer, np.full_like(ones_for(window, layer), gradient, gradient.dtype))
        session.commit(0, 0.1)

    np.testing.assert_array_equal(seen(narrow, tokens), seen(wide, tokens))


def test_a_window_tells_when_its_rows_come_without_waiting(
    session: Session, tokens: TokenIds
) -> None:
    """Those of a later step are not there before it; asking begins and reads nothing."""
    now, later = session.announce(tokens, 0), session.announce(tokens, 1)
    for layer in session.tables:
        assert not later.ready(layer)
        now.rows(layer)
        assert now.ready(layer)
    push_ones(session, now)
    session.commit(0, 0.1)
    for layer in session.tables:
        later.rows(layer)
        assert later.ready(layer)
    with pytest.raises(UnknownLayerError):
        later.ready(99)
    later.close()
    with pytest.raises(WindowClosedError):
        later.ready(1)


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_look_ahead_changes_nothing(both: MakeBoth, ahead: int) -> None:
    """A window announced early reads rows only after all earlier steps, and they are the same."""
    pair = both()
    texts = [random_tokens(np.random.default_rng(step), (2, 40)) for step in range(10)]
    announced: dict[int, Window] = {}
    for step, text in enumerate(texts):
        for coming in range(step, min(step + ahead + 1, len(texts))):
            if coming not in announced:
                announced[coming] = pair.session.announce(texts[coming], coming)
        for coming in range(step + 1, min(step + ahead + 1, len(texts))):
            with pytest.raises(StepGapError):
                announced[coming].rows(1)
        expected = pair.oracle.announce(text, step)
        for layer in pair.session.tables:
            rows, _ = announced[step].rows(layer)
            assert rows.tobytes() == expected.rows(layer)[0].tobytes()
            gradient = pair.rng.standard_normal(rows.shape).astype(np.float32)
            announced[step].push(layer, gradient)
            expected.push(layer, gradient)
        pair.commit()


def test_hyper_parameters_reach_the_rules(both: MakeBoth) -> None:
    """Rates by layer, gradient scale, eps and betas."""
    pair = both(optimizer="adam")
    for _ in range(2):
        pair.announce(random_tokens(pair.rng), pair.step).push_random(pair.rng)
        pair.commit({1: 0.5, 2: 0.01}, gradient_scale=0.25, eps=1e-3, betas=(0.5, 0.75))
    pair.train(1)


def test_the_gradient_norm_is_that_of_the_summed_gradients(
    session: Session, tokens: TokenIds
) -> None:
    """Over all layers; a row in two windows counts with its sum; nothing pending is zero."""
    assert session.gradient_norm() == 0
    squares = 0
    for _ in range(2):
        window = session.announce(tokens, 0)
        push_ones(session, window)
    for layer in session.tables:
        squares += 4 * window.row_ids(layer).size * DIM

    assert session.gradient_norm() == pytest.approx(np.sqrt(squares), rel=1e-6)
    session.commit(0, 0.1)
    assert session.gradient_norm() == 0


def test_gradients_pushed_after_asking_for_the_norm_count(both: MakeBoth) -> None:
    """The norm is a question: what is announced and pushed after it is still part of the step."""
    pair = both()
    for window in range(3):
        pair.announce(random_tokens(pair.rng), 0).push_random(pair.rng)
        norm = pair.session.gradient_norm()
        assert norm == pytest.approx(pair.oracle.gradient_norm(), rel=1e-6), window
    pair.commit()
    pair.train(1)


def test_a_window_closed_without_a_gradient_is_left_out(both: MakeBoth) -> None:
    pair = both()
    kept = pair.announce(random_tokens(pair.rng), 0)
    dropped = pair.session.announce(random_tokens(pair.rng), 0)
    dropped.rows(1)
    dropped.close()
    kept.push_random(pair.rng)
    pair.commit()


def test_a_pushed_window_closed_before_the_commit_is_left_out(both: MakeBoth) -> None:
    """Also when the norm was asked for while it counted."""
    pair = both()
    windows = [pair.announce(random_tokens(pair.rng), 0) for _ in range(2)]
    for window in windows:
        window.push_random(pair.rng)
    pair.session.gradient_norm()
    windows[0].store.close()
    windows[0].oracle.close()
    pair.commit()


# ---------------------------------------------------------------------- commits under way


@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adam"])
def test_commits_that_are_begun_do_what_commits_do(
    both: MakeBoth, optimizer: str, ahead: int
) -> None:
    """Rows, inverse and `Applied`; windows are announced, read and pushed meanwhile."""
    pair = both(optimizer=optimizer)
    windows: dict[int, list[TwinWindow]] = {}
    begun = []
    for step in range(9):
        for coming in range(step, min(step + ahead + 1, 9)):
            if coming not in windows:
                count = 1 + coming % 2
                windows[coming] = [
                    pair.announce(random_tokens(pair.rng), coming) for _ in range(count)
                ]
        for window in windows.pop(step):
            window.push_random(pair.rng)
        applied = pair.session.begin_commit(step, 0.1)
        begun.append((applied, pair.oracle.commit(step, 0.1)))
        assert pair.step == step + 1
    assert all(applied.result() == expected for applied, expected in begun)
    pair.train(1)
    window = pair.announce(random_tokens(pair.rng, (8, 200)))
    for layer in pair.session.tables:
        window.rows(layer)


def test_what_is_wrong_with_a_commit_is_raised_when_it_is_begun(
    session: Session, tokens: TokenIds
) -> None:
    """Before anything is applied; the step can be committed then."""
    before = seen(session, tokens)
    window = session.announce(tokens, 0)
    with pytest.raises(MissingGradientError):
        session.begin_commit(0, 0.1)
    push_ones(session, window)
    with pytest.raises(StepGapError):
        session.begin_commit(1, 0.1)
    with pytest.raises(ConfigError):
        session.begin_commit(0, {1: 0.1})
    with pytest.raises(ConfigError):
        session.begin_commit(0, float("nan"))
    assert session.step == 0
    np.testing.assert_array_equal(seen(session, tokens), before)

    applied = session.begin_commit(0, 0.1)

    assert session.step == 1
    with pytest.raises(DuplicateStepError):
        session.begin_commit(0, 0.1)
    with pytest.raises(DuplicateStepError):
        session.announce(tokens, 0)
    assert applied.result().step == 0
    assert session.step == 1


def test_one_commit_is_under_way_at_a_time(both: MakeBoth) -> None:
    """What needs its result waits for it: the next, the norm, snapshots, restores, the end."""
    pair = both()

    def begin() -> Future[Applied]:
        step = pair.step
        pair.announce(random_tokens(pair.rng, (4, 100)), step).push_random(pair.rng)
        applied = pair.session.begin_commit(step, 0.1)
        pair.oracle.commit(step, 0.1)
        return applied

    first = begin()
    assert pair.session.gradient_norm() == 0
    assert first.done()
    second = begin()
    third = begin()
    assert second.done()
    ref = pair.snapshot()
    assert third.done()
    assert ref.step == 3
    fourth = begin()
    pair.restore(ref)
    assert fourth.done()
    assert pair.step == 3
    fifth = begin()
    sixth = pair.announce(random_tokens(pair.rng), 4)
    sixth.push_random(pair.rng)
    pair.commit()
    assert fifth.done()
    last = begin()
    pair.session.close()
    assert last.result().step == 5


# ---------------------------------------------------------------------- steps


def test_steps_are_numbered_without_gaps_and_applied_once(
    session: Session, tokens: TokenIds
) -> None:
    """A refused commit leaves the pending window as it is."""
    train_once(session, tokens)
    window = session.announce(tokens, 1)
    push_ones(session, window)
    before = seen(session, tokens)

    with pytest.raises(DuplicateStepError, match=r"step 0 was already applied; the next one is 1"):
        session.commit(0, 0.1)
    with pytest.raises(StepGapError, match=r"step 2 cannot be applied: the next one is 1"):
        session.commit(2, 0.1)
    with pytest.raises(DuplicateStepError, match="restore a snapshot"):
        session.announce(tokens, 0)
    np.testing.assert_array_equal(seen(session, tokens), before)

    assert session.commit(1, 0.1).step == 1
    assert session.step == 2


def test_a_missing_gradient_is_named_and_nothing_is_applied(
    session: Session, tokens: TokenIds
) -> None:
    """Of every layer that was read; of all layers where the window was not used at all."""
    before = seen(session, tokens)
    window = session.announce(tokens, 0)

    with pytest.raises(MissingGradientError, match=r"step 0 .* layers 1, 2 "):
        session.commit(0, 0.1)
    window.rows(1)
    window.rows(2)
    window.push(1, ones_for(window, 1))
    with pytest.raises(MissingGradientError, match=r"step 0 .* layers 2 .*close\(\)"):
        session.commit(0, 0.1)

    assert session.step == 0
    np.testing.assert_array_equal(seen(session, tokens), before)
    window.push(2, ones_for(window, 2))
    session.commit(0, 0.1)


def test_a_layer_that_was_not_read_needs_no_gradient(both: MakeBoth, tokens: TokenIds) -> None:
    """A model may use only some of the tables; the others stay as they are."""
    pair = both()
    window = pair.announce(tokens, 0)
    window.push(1, np.ones_like(window.rows(1), np.float32))

    assert pair.commit().rows[2] == 0

    pair.train(1)


@pytest.mark.parametrize("wrong", [{"lr": -0.1}, {"lr": float("nan")}, {"lr": {1: 0.1}}])
def test_senseless_hyper_parameters_are_refused_before_anything_changes(
    session: Session, tokens: TokenIds, wrong: dict[str, Any]
) -> None:
    """Also a rate for only some of the layers: all tables are updated together or not at all."""
    before = seen(session, tokens)
    push_ones(session, session.announce(tokens, 0))

    with pytest.raises(ConfigError):
        session.commit(0, **wrong)

    assert session.step == 0
    np.testing.assert_array_equal(seen(session, tokens), before)
    session.commit(0, 0.1)


# ---------------------------------------------------------------------- gradients


def test_gradients_that_do_not_fit_are_refused_and_not_kept(
    session: Session, tokens: TokenIds
) -> None:
    """Wrong rows, width, dtype and memory order; the right one is taken afterwards."""
    window = session.announce(tokens, 0)
    good = ones_for(window, 1)
    n = len(good)

    with pytest.raises(ShapeError, match=rf"shape \({n - 1}, {DIM}\), expected \({n}, {DIM}\)"):
        window.push(1, good[1:])
    with pytest.raises(ShapeError, match="shape"):
        window.push(1, np.ones((n, DIM + 1), np.float32))
    with pytest.raises(ShapeError, match="contiguous"):
        window.push(1, np.asfortranarray(good))
    with pytest.raises(DtypeError, match=r"float64, expected float32"):
        window.push(1, good.astype(np.float64))

    push_ones(session, window)
    with pytest.raises(ProtocolError, match="pushed before"):
        window.push(1, good)
    session.commit(0, 0.1)


def test_a_window_that_is_only_read_takes_no_gradient(session: Session, tokens: TokenIds) -> None:
    window = session.announce(tokens)
    with pytest.raises(ReadOnlyError, match="without a step"):
        window.push(1, ones_for(window, 1))
    train_once(session, tokens)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [False, True])
def test_rejected_gradients_name_the_row_and_may_be_pushed_again(
    session: Session, tokens: TokenIds, value: float, bits: bool
) -> None:
    """NaN and infinity, in float32 and in bfloat16."""
    window = session.announce(tokens, 0)
    bad = ones_for(window, 1)
    bad[3, 5] = value
    bad[7, 0] = value
    pushed = (bad.view(np.uint32) >> 16).astype(np.uint16) if bits else bad
    row = window.row_ids(1)[3]

    with pytest.raises(
        NonFiniteGradientError, match=rf"layer 1 at step 0.*2 rows, first in row {row}"
    ):
        window.push(1, pushed)

    push_ones(session, window)
    session.commit(0, 0.1)


def test_skipped_rows_stay_and_are_counted(both: MakeBoth) -> None:
    """A row that is bad in one of two windows is left out of the whole step."""
    pair = both(on_nonfinite="skip")
    tokens = random_tokens(pair.rng, (1, 8))
    before = seen(pair.session, tokens)
    windows = [pair.announce(tokens, 0) for _ in range(2)]
    for number, window in enumerate(windows):
        for layer in window.layers:
            gradient = pair.rng.standard_normal(window.rows(layer).shape).astype(np.float32)
            gradient[2 + number, 4] = [np.nan, np.inf][number]
            window.push(layer, gradient)
    assert np.isfinite(pair.session.gradient_norm())

    applied = pair.commit()

    assert applied.skipped_rows == {1: 2, 2: 2}
    after = seen(pair.session, tokens)
    np.testing.assert_array_equal(after[2:4], before[2:4])
    assert (after[:2] != before[:2]).any()


def test_accepted_nonfinite_gradients_reach_the_rows(make: Make, tokens: TokenIds) -> None:
    """Only theirs."""
    session = make(on_nonfinite="accept", dtype="float32", optimizer="sgd")
    window = session.announce(tokens, 0)
    push_ones(session, session.announce(tokens, 0))
    for layer in session.tables:
        gradient = ones_for(window, layer)
        gradient[1] = np.nan
        window.push(layer, gradient)

    assert session.commit(0, 0.1).skipped_rows == {1: 0, 2: 0}

    bad = np.isnan(seen(session, tokens)).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(bad), [1])


# ---------------------------------------------------------------------- snapshots


def test_restore_goes_back_and_training_goes_on_from_there(both: MakeBoth) -> None:
    """Rows and optimiser state are those of the snapshot."""
    pair = both(optimizer="adam")
    pair.train(2)
    ref = pair.snapshot()
    assert (ref.step, ref.store_id) == (2, pair.session.store_id)
    pair.train(3)
    early = pair.session.announce(random_tokens(pair.rng), pair.step)

    pair.restore(ref)

    assert pair.step == 2
    with pytest.raises(WindowClosedError):
        early.rows(1)
    pair.train(3)


def test_restore_forgets_newer_snapshots(both: MakeBoth) -> None:
    pair = both()
    pair.train(1)
    old = pair.snapshot()
    pair.train(1)
    new = pair.snapshot()
    pair.restore(old)

    with pytest.raises(SnapshotMismatchError):
        pair.session.restore(new)

    pair.train(1)


def test_snapshots_of_other_stores_and_ways_are_refused(both: MakeBoth) -> None:
    """Another store's, another digest's, a missing step: nothing changes, windows stay open."""
    pair = both()
    pair.train(1)
    ref = pair.snapshot()
    pair.train(1)
    window = pair.announce(random_tokens(pair.rng), 2)
    wrong = (
        replace(ref, store_id="0" * 32),
        replace(ref, digest="0" * 64),
        replace(ref, step=7),
        7,
    )
    for snapshot in wrong:
        with pytest.raises(SnapshotMismatchError):
            pair.session.restore(snapshot)

    assert pair.step == 2
    window.push_random(pair.rng)
    pair.commit()
    pair.restore(ref)
    pair.train(1)


def test_a_snapshot_may_be_named_by_its_step(both: MakeBoth) -> None:
    pair = both()
    pair.train(1)
    pair.snapshot()
    pair.train(1)
    pair.session.restore(1)
    pair.oracle.restore(1)
    pair.train(1)


def test_a_snapshot_taken_again_at_its_step_stays_the_same_snapshot(both: MakeBoth) -> None:
    """The checkpoint that carries the first reference goes on being good."""
    pair = both()
    pair.train(2)
    first = pair.snapshot()
    pair.restore(first)
    second = pair.snapshot()
    pair.train(1)

    pair.restore(first)

    assert second == first


# ---------------------------------------------------------------------- the end


def test_a_closed_session_refuses_everything(session: Session, tokens: TokenIds) -> None:
    """Closing twice is fine."""
    window = session.announce(tokens, 0)
    session.close()
    session.close()
    for call in (
        lambda: session.announce(tokens),
        lambda: session.commit(0, 0.1),
        lambda: session.snapshot(),
        lambda: session.restore(0),
        lambda: window.rows(1),
        lambda: window.push(1, np.ones((1, DIM), np.float32)),
    ):
        with pytest.raises(StoreClosedError, match="closed"):
            call()
    window.close()


def test_a_session_counts_windows_and_steps(session: Session, tokens: TokenIds) -> None:
    session.announce(tokens).close()
    train_once(session, tokens)

    stats = session.stats()

    assert (stats.windows, stats.steps) == (2, 1)
