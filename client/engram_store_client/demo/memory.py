"""The part to copy into a training script of one's own: a store, a memory, and its loop."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import engram_store
from engram_store.recipes import compress_vocabulary, engram
from engram_store.session import Session
from engram_store_client.demo.base import (
    PAD,
    OnStep,
    Sequences,
    loss_of,
    schedule,
    set_rate,
    training_batches,
)
from engram_store_client.demo.settings import Settings
from engram_store_client.huggingface import attach
from engram_store_client.memory import Memory

OPTIMIZER_FILE = "optimizer.pt"


def create_store(path: Path, tokenizer_file: Path, settings: Settings) -> None:
    """Tables for the decoder layers of `settings.layers`, on disk.

    Rows start at zero, so an n-gram that was never trained adds nothing. (Random rows add noise
    for every n-gram of a held-out file that training did not show.)
    """
    recipe = engram(
        token_map=compress_vocabulary(tokenizer_file),
        layers=settings.layers,
        rows_per_head=settings.rows_per_head,
        heads=settings.heads,
        pad_id=PAD,
        seed=settings.seed,
    )
    engram_store.create(
        path,
        recipe,
        dim=settings.dim,
        optimizer=settings.optimizer,
        seed=settings.seed,
    )


@dataclass(eq=False)
class Arm:
    """A frozen base with a memory, in training."""

    model: nn.Module
    memory: Memory
    optimizer: torch.optim.Optimizer
    """Of the gates. Tables have their own, in the store."""
    settings: Settings
    seconds: float = 0.0
    """Spent in training."""

    def train(self, data: Sequences, stop: int, on_step: OnStep) -> None:
        """Train up to step `stop`, from wherever the memory is."""
        memory, settings = self.memory, self.settings
        self.model.train()
        batches = training_batches(data, settings, memory.step, stop)
        start = time.perf_counter()
        for batch in memory.look_ahead(batches):
            step = memory.step
            lr = settings.lr * schedule(step, settings.steps)
            set_rate(self.optimizer, lr)
            loss = loss_of(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            memory.clip_grad_norm_(memory.gates.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            memory.commit(step, lr * settings.table_factor)
            on_step(step, loss.item())
        self.seconds += time.perf_counter() - start

    def save(self, directory: Path) -> None:
        """Write a checkpoint: gates, their optimiser, and the name of a snapshot of the tables."""
        self.memory.save_pretrained(directory)
        torch.save(self.optimizer.state_dict(), directory / OPTIMIZER_FILE)

    def load(self, directory: Path) -> None:
        """Go back to a checkpoint, the tables included."""
        self.memory.load(directory)
        self.optimizer.load_state_dict(torch.load(directory / OPTIMIZER_FILE))


def make_arm(
    model: nn.Module, session: Session, settings: Settings, *, zero_table: bool = False
) -> Arm:
    """Attach a memory to a model, which is frozen; `zero_table` makes the control."""
    torch.manual_seed(settings.seed)
    # Biases as in the official demo: without them the control could not learn at all. Projections
    # start at random, not as the identity: beside rows of zero nothing would get a gradient.
    memory = attach(model, session, zero_table=zero_table, bias=True, identity_init=False)
    optimizer = torch.optim.AdamW(memory.gates.parameters(), weight_decay=0.0)
    return Arm(model, memory, optimizer, settings)
