"""One rank of `torchrun`: trains a tiny model under DDP, and writes down what came of it."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from engram_store.session import Session
from engram_store_client import Memory, attach, connect, rank_options
from tests.unit.client.tiny import llama, make_tokens, scramble
from tests.unit.trainer_runs import Texts, arguments, attached, make_trainer, series

STEPS, RANKS = 4, 2
TABLE_RATE = 0.5


def part(step: int, rank: int) -> Tensor:
    """Token ids [2, 9] of a rank's part of a step's batch."""
    return make_tokens(seed=100 + step * RANKS + rank)


def prepared(model: nn.Module, memory: Memory) -> torch.optim.Optimizer:
    """The same start everywhere."""
    scramble(memory)
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def main(first: str, second: str, results: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with connect(first, **rank_options()) as session:
        found = loop(session)
    with connect(second, **rank_options()) as session:
        found["trainer"] = trainer_norms(session, results / "run", world_size=RANKS)
        # The last steps once more: what is left in the store is of the resumed run.
        half = results / "run" / f"checkpoint-{STEPS // 2}"
        found["resumed"] = trainer_norms(session, results / "run", world_size=RANKS, resume=half)
    torch.save(found, results / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def loop(session: Session) -> dict[str, Any]:
    """The hand-written loop of a rank."""
    rank = torch.distributed.get_rank()
    model = llama()
    memory = attach(model, session, mode="full")
    optimizer = prepared(model, memory)
    wrapped = DistributedDataParallel(model)
    sent = [0]

    def counting(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        sent[0] += bucket.buffer().numel()
        world = torch.distributed.group.WORLD
        assert world is not None
        return allreduce_hook(world, bucket)

    wrapped.register_comm_hook(None, counting)
    norms = []
    batches = [{"input_ids": part(step, rank)} for step in range(STEPS)]
    for step, batch in enumerate(memory.look_ahead(batches)):
        loss = wrapped(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        norms.append(float(memory.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        memory.commit(step, lr=TABLE_RATE, wait=False)
    memory.finish_commit()
    return {
        "norms": norms,
        "dense": model.state_dict(),
        "sent": sent[0],
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def trainer_norms(
    session: Session, directory: Path, *, world_size: int, resume: Path | None = None
) -> list[float]:
    """What a Trainer logs; one rank takes the batches of all by accumulation."""
    memory = attached(session)
    args = arguments(
        directory,
        gradient_accumulation_steps=RANKS // world_size,
        max_grad_norm=0.5,
        ddp_backend="gloo" if world_size > 1 else None,
        dataloader_drop_last=True,
        save_strategy="steps",
        save_steps=STEPS // 2,
    )
    trainer = make_trainer(memory, args, train_dataset=Texts(4 * STEPS))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    memory.detach()
    return series(trainer, "grad_norm")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
