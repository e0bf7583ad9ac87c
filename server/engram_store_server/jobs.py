"""Who trains a store: one job at a time, and what its ranks do together.

A job is one trainer, or several ranks of which each brings a part of every step. What concerns a
whole step is asked by every rank and done once, when the last has asked.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from engram_store.engine.memtable import MAX_MARKS
from engram_store.errors import ProtocolError
from engram_store.layout.manifest import Mark
from engram_store.v1 import store_pb2 as pb

Answer = Callable[[pb.SessionResponse], None]
Work = Callable[[bool], pb.SessionResponse]
"""Does something once for all ranks; never raises. Is told whether every rank wants part of the
result before it is done."""


class Member(Protocol):
    """A rank's connection, as its job sees it."""

    session_id: str
    epoch: int
    rank: int
    world_size: int

    async def leave(self) -> None:
        """End the connection and wait until nothing of it is under way."""
        ...

    async def ends_within(self, seconds: float) -> bool:
        """Wait for the connection to end by itself; whether it has."""
        ...


@dataclass(slots=True)
class _Joint:
    """Something that every rank has to ask for."""

    what: str
    """For people, and compared: ranks must ask for the same."""
    asked: bytes
    answers: dict[int, Answer] = field(default_factory=dict)
    """By rank."""
    early: dict[int, bool] = field(default_factory=dict)
    """By rank: whether it is ready for part of the result before the work is done."""


class Job:
    """The ranks that train a store together.

    Args:
        session_id: what they share.
        world_size: how many there are.
    """

    def __init__(self, session_id: str, world_size: int) -> None:
        self.session_id, self.world_size = session_id, world_size
        self.members: dict[int, Member] = {}
        self.epochs: dict[int, int] = {}
        """Of the newest connection of each rank; older ones are fenced."""
        self._lock = threading.Condition()
        self._joint: _Joint | None = None
        self._working = False
        """Whether a rank's thread does what all have asked for."""

    def marks(self, step: int) -> tuple[Mark, ...]:
        """What a commit record says of whom it was applied for."""
        return tuple(
            Mark(session=self.session_id, epoch=member.epoch, step=step, part=rank)
            for rank, member in sorted(self.members.items())
        )

    def together(
        self,
        rank: int,
        what: str,
        asked: bytes,
        work: Work,
        answer: Answer,
        *,
        early: bool = False,
    ) -> None:
        """Do `work` on the thread of the last rank that asks; every rank gets the response.

        Args:
            rank: who asks.
            what: a name of the work, with its step.
            asked: its arguments, encoded; they must be the same everywhere.
            work: what to do.
            answer: gets the response; called once, on any rank's thread.
            early: whether the rank is ready for part of the result before the work is done. It is
                given early if all are: one that is not would not know what to do with it if the
                work then fails.

        Raises:
            ProtocolError: the ranks that wait have asked for something else.
        """
        with self._lock:
            joint = self._joint or _Joint(what, asked)
            if joint.what != what:
                raise ProtocolError(
                    f"rank {rank} asks for {what} while rank {min(joint.answers)} waits in "
                    f"{joint.what}; all ranks of a job must make the same calls in the same order"
                )
            if joint.asked != asked:
                raise ProtocolError(
                    f"rank {rank} asks for {what} with other arguments (learning rates, scale, "
                    f"eps, betas, snapshot) than rank {min(joint.answers)}; they must be equal"
                )
            joint.answers[rank], joint.early[rank] = answer, early
            self._joint = joint
            if len(joint.answers) < self.world_size:
                return
            self._joint, self._working = None, True
        try:
            response = work(all(joint.early[member] for member in joint.answers))
            for give in joint.answers.values():
                own = pb.SessionResponse()
                own.CopyFrom(response)
                give(own)
        finally:
            with self._lock:
                self._working = False
                self._lock.notify_all()

    def leave(self, member: Member) -> None:
        """A connection has ended; what it waits for must be asked again by the next.

        Returns when nothing is done that it has asked for: its windows may be closed then.
        """
        with self._lock:
            if self.members.get(member.rank) is not member:
                return
            self._lock.wait_for(lambda: not self._working)
            del self.members[member.rank]
            if self._joint is not None:
                self._joint.answers.pop(member.rank, None)
                if not self._joint.answers:
                    self._joint = None


class Trainers:
    """Admits trainers to one store.

    Args:
        handover_seconds: how long a new trainer waits for one that was stopped to be noticed.
    """

    def __init__(self, handover_seconds: float) -> None:
        self._handover_seconds = handover_seconds
        self._job: Job | None = None

    @property
    def connected(self) -> int:
        """Ranks that train now."""
        return 0 if self._job is None else len(self._job.members)

    async def admit(self, member: Member) -> Job:
        """Make a connection the one of its rank; an older one of the same rank is ended.

        What the older one had under way is finished first: the step in Welcome is what counts,
        and windows that are announced again must not meet themselves.

        Raises:
            ProtocolError: another job trains, or a newer connection of this rank.
        """
        if not member.rank < member.world_size <= MAX_MARKS:
            raise ProtocolError(
                f"rank {member.rank} of {member.world_size}; ranks count from 0, and a store is "
                f"trained by at most {MAX_MARKS}"
            )
        while True:
            job = self._job
            if job is None or not job.members:
                job = self._job = Job(member.session_id, member.world_size)
            elif job.session_id != member.session_id:
                await self._wait_for_end(job)
                continue
            elif job.world_size != member.world_size:
                raise ProtocolError(
                    f"rank {member.rank} says that the job has {member.world_size} ranks; those "
                    f"that are connected say {job.world_size}"
                )
            current = job.members.get(member.rank)
            if member.epoch <= job.epochs.get(member.rank, -1):
                await self._refuse_older(job, current, member)
            elif current is not None:
                await current.leave()
                job.leave(current)
            else:
                job.members[member.rank] = member
                job.epochs[member.rank] = member.epoch
                return job

    async def _wait_for_end(self, job: Job) -> None:
        """A trainer that was just stopped may not have been noticed yet. Raises: ProtocolError."""
        rank = min(job.members)
        if not await job.members[rank].ends_within(self._handover_seconds):
            raise ProtocolError(
                "another session is training this store; connect with mode='read', or wait "
                "until it has ended"
            )

    async def _refuse_older(self, job: Job, current: Member | None, member: Member) -> None:
        """Unless the job has just ended, and another of its name begins.

        Raises: ProtocolError.
        """
        if current is not None and await current.ends_within(self._handover_seconds):
            job.leave(current)
        if job.members:
            raise ProtocolError(
                f"epoch {member.epoch} of rank {member.rank} was replaced by "
                f"{job.epochs[member.rank]}: another connection of the same trainer took over. "
                "If this process was started anew, all ranks must begin again together"
            )
