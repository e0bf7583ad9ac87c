"""The demo from beginning to end."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engram_store_client.demo.base import (
    Sequences,
    encode,
    evaluation_batches,
    make_base,
    perplexity,
    prepare_torch,
    train_base,
    train_tokenizer,
)
from engram_store_client.demo.corpus import collect
from engram_store_client.demo.files import DemoFiles
from engram_store_client.demo.interrupt import Interrupted, Undisturbed, interrupt
from engram_store_client.demo.memory import Arm, create_store, make_arm
from engram_store_client.demo.process import require_server
from engram_store_client.demo.progress import Phases
from engram_store_client.demo.report import ArmResult, Perplexities, Report
from engram_store_client.demo.settings import Settings
from engram_store_client.demo.stores import Stores, socket_directory, transport
from engram_store_client.demo.tables import changed_rows
from engram_store_client.demo.waits import RowWaits


@dataclass(frozen=True, slots=True)
class _Data:
    """Token sequences: the base learns `code`, the memory learns `prose`."""

    code: Sequences
    held_out_code: Sequences
    prose: Sequences
    held_out_prose: Sequences


def run_demo(directory: Path, settings: Settings, *, embedded: bool = False) -> Report:
    """Run every phase in order.

    Args:
        directory: gets all files; empty.
        settings: the numbers of the run.
        embedded: open stores in the trainer's process instead of through `engram-store serve`;
            then only a trainer is killed, no store.

    Raises:
        ConfigError: no store process can run here.
        StoreProcessError: one did not start, or ended without being asked to.
        EngramStoreError, OSError.
    """
    files = DemoFiles(directory.absolute())
    if embedded:
        return _run(files, Stores(files.log, None), settings)
    require_server()
    with socket_directory(files.sockets, longest=f"{files.control_store.stem}.sock") as sockets:
        return _run(files, Stores(files.log, sockets), settings)


def _run(files: DemoFiles, stores: Stores, settings: Settings) -> Report:
    start = time.perf_counter()
    settings.save(files.settings)
    prepare_torch(settings)
    with Phases() as phases:
        data = _prepare_text(files, settings, phases)
        model = _train_base(files, data, settings, phases)
        base = _perplexities(model, data, settings)
        control = _run_control(files, stores, model, data, settings, phases)
        engram, losses = _run_engram(files, stores, model, data, settings, phases)
        undisturbed = Undisturbed(losses=losses, step_seconds=engram.seconds / engram.steps)
        interrupted = _interrupt(files, stores, model, data, settings, undisturbed, phases)
    return Report(
        base=base,
        control=control,
        engram=engram,
        interrupted=interrupted,
        phase_seconds=phases.seconds,
        seconds=time.perf_counter() - start,
    )


def _prepare_text(files: DemoFiles, settings: Settings, phases: Phases) -> _Data:
    """From files of this machine to token sequences."""
    with phases.jobs("text and tokenizer", 3) as begin:
        begin("reading files")
        code, prose = collect(settings.code_chars, settings.prose_chars)
        begin(f"BPE on {code.files + prose.files:,} files")
        tokenizer = train_tokenizer((*code.train, *prose.train), settings.vocabulary)
        tokenizer.save(str(files.tokenizer))
        begin("encoding")
        parts = (code.train, code.held_out, prose.train, prose.held_out)
        data = _Data(*(encode(tokenizer, texts, settings.time) for texts in parts))
        np.save(files.prose, data.prose)
    return data


def _train_base(files: DemoFiles, data: _Data, settings: Settings, phases: Phases) -> nn.Module:
    """A model that knows code only."""
    model = make_base(settings)
    with phases.phase("base model, code", settings.base_steps) as on_step:
        train_base(model, data.code, settings, on_step)
    torch.save(model.state_dict(), files.base)
    return model


def _run_control(
    files: DemoFiles,
    stores: Stores,
    model: nn.Module,
    data: _Data,
    settings: Settings,
    phases: Phases,
) -> ArmResult:
    """Everything as with Engram, except that all rows are zero and stay so."""
    create_store(files.control_store, files.tokenizer, settings)
    with stores.serve(files.control_store) as store, store.train() as session:
        waits = RowWaits()
        arm = make_arm(model, waits.measured(session), settings, zero_table=True)
        with phases.phase("zero-table control, prose", settings.steps) as on_step:
            arm.train(data.prose, settings.steps, on_step)
        result = _measure(arm, waits, data, settings)
    return replace(result, rows=changed_rows(files.control_store))


def _run_engram(
    files: DemoFiles,
    stores: Stores,
    model: nn.Module,
    data: _Data,
    settings: Settings,
    phases: Phases,
) -> tuple[ArmResult, list[float]]:
    """The memory itself; also returns the loss of every step."""
    losses: list[float] = []
    create_store(files.store, files.tokenizer, settings)
    with stores.serve(files.store) as store, store.train() as session:
        waits = RowWaits()
        arm = make_arm(model, waits.measured(session), settings)
        with phases.phase("Engram, prose", settings.steps) as show:

            def on_step(step: int, loss: float) -> None:
                losses.append(loss)
                show(step, loss)

            arm.train(data.prose, settings.compare_at, on_step)
            arm.save(files.reference)
            arm.train(data.prose, settings.steps, on_step)
        result = _measure(arm, waits, data, settings)
    return replace(result, rows=changed_rows(files.store)), losses


def _interrupt(
    files: DemoFiles,
    stores: Stores,
    model: nn.Module,
    data: _Data,
    settings: Settings,
    undisturbed: Undisturbed,
    phases: Phases,
) -> Interrupted:
    """The first steps once more: trainer and store are killed, and nothing is different."""
    create_store(files.second_store, files.tokenizer, settings)
    steps = settings.kill_after + 1 + settings.compare_at - settings.snapshot_at
    with phases.phase("the same, killed and resumed", steps) as on_step:
        return interrupt(files, stores, model, data.prose, settings, undisturbed, on_step)


def _measure(arm: Arm, waits: RowWaits, data: _Data, settings: Settings) -> ArmResult:
    """An arm's counters and perplexities; the model is as before then."""
    arm.memory.session.snapshot()  # what training wrote ends up on disk, and is counted
    stats, guards = arm.memory.session.stats(), arm.memory.guards()
    perplexities = _perplexities(arm.model, data, settings, arm)
    arm.memory.detach()
    return ArmResult(
        perplexities=perplexities,
        guards=guards,
        transport=transport(arm.memory.session),
        stats=stats,
        seconds=arm.seconds,
        wait_seconds=waits.seconds,
        steps=settings.steps,
    )


def _perplexities(
    model: nn.Module, data: _Data, settings: Settings, arm: Arm | None = None
) -> Perplexities:
    """On held-out files of both domains."""
    values = []
    for held_out in (data.held_out_prose, data.held_out_code):
        batches = evaluation_batches(held_out, settings)
        ahead = batches if arm is None else arm.memory.look_ahead(batches, train=False)
        values.append(perplexity(model, ahead))
    return Perplexities(*values)
