"""Answers that no store gives: nothing of them is believed, and the session ends with a reason."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engram_store import wire
from engram_store.errors import EngramStoreError, ProtocolError
from engram_store.session import SnapshotRef
from engram_store.v1 import store_pb2 as pb
from engram_store_client.remote import RemoteSession
from engram_store_client.remote.expected import check_answer
from tests.fuzz.samples import metadata
from tests.fuzz.targets.answers import TOKENS, Answers, answering

SECONDS = 30.0
"""Nothing takes that long: what ends, ends by what is answered."""
GOOD: dict[str, dict[str, Any]] = {
    "announce": {"announced": pb.Announced()},
    "read": {"rows": pb.Rows()},
    "release": {"released": pb.Released()},
    "push": {"pushed": pb.Pushed()},
    "gradient_norm": {"norm": pb.Norm()},
    "commit": {"applied": pb.Applied(step=3)},
    "take_snapshot": {"snapshot_taken": pb.SnapshotTaken()},
    "restore": {"restored": pb.Restored(step=3)},
}


def request(kind: str) -> pb.SessionRequest:
    """About step 3, where it is about a step."""
    message = pb.SessionRequest(id=1)
    getattr(message, kind).SetInParent()
    if kind == "commit":
        message.commit.step = 3
    if kind == "restore":
        message.restore.snapshot.step = 3
    return message


@pytest.mark.parametrize("asked", GOOD)
def test_every_request_has_one_kind_of_answer_besides_a_failure(asked: str) -> None:
    check_answer(request(asked), pb.SessionResponse(**GOOD[asked]))
    check_answer(request(asked), pb.SessionResponse(failure=pb.Failure()))
    for other, answer in GOOD.items():
        if other != asked:
            with pytest.raises(ProtocolError, match=f"answered '{asked}' with"):
                check_answer(request(asked), pb.SessionResponse(**answer))
    with pytest.raises(ProtocolError, match="with None"):
        check_answer(request(asked), pb.SessionResponse())


def test_every_request_of_the_protocol_is_known() -> None:
    """A new one needs its answer there, but for those that are no questions."""
    kinds = {field.name for field in pb.SessionRequest.DESCRIPTOR.oneofs[0].fields}
    assert kinds - {"hello", "goodbye", "gradient_chunk"} == GOOD.keys()


def until_commit() -> Answers:
    """A good session, up to the question whether step 0 was applied."""
    answers = Answers()
    answers.welcome()
    answers.window()
    for _ in metadata().tables:
        answers.give(pushed=pb.Pushed())
    return answers


def train_until_commit(session: RemoteSession) -> None:
    window = session.announce(TOKENS, 0)
    for layer, spec in session.tables.items():
        rows, _ = window.rows(layer)
        window.push(layer, np.ones((len(rows), spec.dim), np.float32))


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ({"released": pb.Released()}, "'commit' with 'released'"),
        ({"applied": pb.Applied(step=5)}, "'commit' of step 0 with step 5"),
        ({"restored": pb.Restored(step=9)}, "'commit' with 'restored'"),
        ({}, "'commit' with None"),
    ],
)
def test_a_wrong_answer_to_a_commit_ends_the_session_and_counts_no_step(
    answer: dict[str, Any], part: str
) -> None:
    """Whether the step was applied is not known; training on could apply it twice or never."""
    answers = until_commit()
    answers.give(**answer)
    with (
        answering(answers.frames, SECONDS) as options,
        RemoteSession("h:1", options=options) as session,
    ):
        train_until_commit(session)
        for call in (lambda: session.commit(0, 0.5), session.snapshot):
            with pytest.raises(ProtocolError) as caught:
                call()
            assert part in str(caught.value)
        assert session.step == 0


def edit_inverse(rows: pb.Rows) -> None:
    inverse = wire.decode_array(rows.inverse).copy()
    inverse[0, 0, 0] = -1
    rows.inverse.CopyFrom(wire.encode_array(inverse))


def edit_ids(rows: pb.Rows) -> None:
    ids = wire.decode_array(rows.row_ids).copy()
    ids[-1] = metadata().tables[1].rows
    rows.row_ids.CopyFrom(wire.encode_array(ids))


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (edit_inverse, r"positions among \d+ rows that reach from -1"),
        (edit_ids, "row ids of a table of 24 rows that reach from 0 to 24"),
    ],
)
def test_ids_and_positions_that_reach_too_far_never_reach_the_trainer(
    edit: Callable[[pb.Rows], None], part: str
) -> None:
    """It would read memory that is not the rows', on a GPU without being told."""
    answers = until_commit()
    connection, raw = answers.frames[2]
    response = pb.SessionResponse.FromString(raw)
    edit(response.rows)
    answers.frames[2:] = [(connection, response.SerializeToString())]
    with (
        answering(answers.frames, SECONDS) as options,
        RemoteSession("h:1", options=options) as session,
    ):
        window = session.announce(TOKENS, 0)
        with pytest.raises(ProtocolError, match=part):
            window.rows(1)


def test_another_store_at_the_same_address_is_not_gone_on_with() -> None:
    """The same recipe at the same step: nothing else would tell them apart."""
    answers = until_commit()
    answers.give(durable=pb.Durable())  # when the commit was asked for; then the stream ends
    answers.break_off()
    answers.welcome()
    connection, raw = answers.frames[-1]
    response = pb.SessionResponse.FromString(raw)
    response.welcome.store_id = "ef" * 16
    answers.frames[-1] = connection, response.SerializeToString()
    with (
        answering(answers.frames, SECONDS) as options,
        RemoteSession("h:1", options=options) as session,
    ):
        train_until_commit(session)
        with pytest.raises(ProtocolError, match=f"store '{'ef' * 16}' answers at h:1 now"):
            session.commit(0, 0.5)


def test_shared_memory_that_was_not_asked_for_is_refused() -> None:
    """Over TCP there is no second socket; a file of that name would be somebody else's."""
    answers = Answers()
    answers.welcome()
    response = pb.SessionResponse.FromString(answers.frames[0][1])
    response.welcome.slot_token = b"t" * 16
    with (
        answering([(0, response.SerializeToString())], SECONDS) as options,
        pytest.raises(ProtocolError, match="offers shared memory that was not asked for"),
    ):
        RemoteSession("h:1", options=options)


def test_a_snapshot_of_another_store_is_refused() -> None:
    """A checkpoint would name it."""
    answers = Answers()
    answers.welcome()
    ref = SnapshotRef(store_id="ef" * 16, step=0, digest="ab" * 32)
    answers.give(snapshot_taken=pb.SnapshotTaken(snapshot=wire.encode_ref(ref)))
    with (
        answering(answers.frames, SECONDS) as options,
        RemoteSession("h:1", options=options) as session,
        pytest.raises(EngramStoreError, match="a snapshot of store 'efef"),
    ):
        session.snapshot()
