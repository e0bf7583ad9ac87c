"""A request that was sent, or will be, and its answer."""

from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from engram_store.errors import EngramStoreError
from engram_store.types import GradientBlock
from engram_store.v1 import store_pb2 as pb
from engram_store_client.remote.incoming import ReceivedArrays, WantedRows
from engram_store_client.remote.slots import TrainerSlots


@dataclass(eq=False, slots=True)
class Pending:
    """A request in the journal."""

    request: pb.SessionRequest
    window: int | None
    """The window it belongs to."""
    gradients: GradientBlock | None = None
    """Of a push: the caller's own, sent again as it is."""
    answer: Future[pb.SessionResponse] = field(default_factory=Future)
    sent: float = 0.0
    """When it was last sent, by the monotonic clock."""
    wanted: WantedRows | None = None
    """Of a read: what its answer can look like."""
    arrays: ReceivedArrays = field(default_factory=dict)
    """Of a read: what came in chunks."""
    slots: TrainerSlots | None = None
    """Shared memory of the connection that the answer came through."""

    @property
    def kind(self) -> str:
        """Name of the request's message."""
        return self.request.WhichOneof("request") or ""

    @property
    def lasts(self) -> bool:
        """Whether it is needed until its window closes, answered or not."""
        return self.kind in ("announce", "push")

    def has_answer(self, kind: str) -> bool:
        """Whether the store gave this kind of answer."""
        answer = self.answer
        if not answer.done() or answer.exception() is not None:
            return False
        return bool(answer.result().WhichOneof("response") == kind)

    def settle(self, outcome: pb.SessionResponse | EngramStoreError) -> bool:
        """Give it its answer or its error; whether it had none before."""
        try:
            if isinstance(outcome, EngramStoreError):
                self.answer.set_exception(outcome)
            else:
                self.answer.set_result(outcome)
        except InvalidStateError:
            return False
        return True
