"""Which answers a request can have. A store that gives others cannot be followed any further."""

from engram_store.errors import ProtocolError
from engram_store.v1 import store_pb2 as pb

_ANSWERS = {
    "announce": "announced",
    "read": "rows",
    "release": "released",
    "push": "pushed",
    "gradient_norm": "norm",
    "commit": "applied",
    "take_snapshot": "snapshot_taken",
    "restore": "restored",
}
"""Besides a failure, by the request."""


def check_answer(request: pb.SessionRequest, response: pb.SessionResponse) -> None:
    """Refuse an answer to something else, before anything of it is believed.

    Raises:
        ProtocolError: it is of another kind, or about another step.
    """
    asked, kind = request.WhichOneof("request") or "", response.WhichOneof("response")
    if kind == "failure":
        return
    if kind != _ANSWERS.get(asked):
        raise ProtocolError(
            f"the store answered {asked!r} with {kind!r}, allowed is {_ANSWERS.get(asked)!r} or a "
            "failure; it or the connection is broken, connect again"
        )
    for answers, told, wanted in (
        ("applied", response.applied.step, request.commit.step),
        ("restored", response.restored.step, request.restore.snapshot.step),
    ):
        if kind == answers and told != wanted:
            raise ProtocolError(
                f"the store answered {asked!r} of step {wanted:,} with step {told:,}; it or the "
                "connection is broken, connect again"
            )
