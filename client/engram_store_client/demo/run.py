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
from engram_store_client.demo.memory import Arm, create_store, make_arm
from engram_store_client.demo.progress import Phases
from engram_store_client.demo.report import ArmResult, Perplexities, Report
from engram_store_client.demo.resume import Resumed, kill_and_resume
from engram_store_client.demo.settings import Settings
from engram_store_client.demo.tables import changed_rows
from engram_store_client.transport import connect


@dataclass(frozen=True, slots=True)
class _Data:
    """Token sequences: the base learns `code`, the memory learns `prose`."""

    code: Sequences
    held_out_code: Sequences
    prose: Sequences
    held_out_prose: Sequences


def run_demo(directory: Path, settings: Settings) -> Report:
    """Run every phase in order. Raises: EngramStoreError, OSError."""
    files, start = DemoFiles(directory), time.perf_counter()
    settings.save(files.settings)
    prepare_torch(settings)
    with Phases() as phases:
        data = _prepare_text(files, settings, phases)
        model = _train_base(files, data, settings, phases)
        base = _perplexities(model, data, settings)
        control = _run_control(files, model, data, settings, phases)
        engram, losses = _run_engram(files, model, data, settings, phases)
        resumed = _interrupt(files, settings, losses, phases)
    return Report(
        base=base,
        control=control,
        engram=engram,
        resumed=resumed,
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
    files: DemoFiles, model: nn.Module, data: _Data, settings: Settings, phases: Phases
) -> ArmResult:
    """Everything as with Engram, except that all rows are zero and stay so."""
    create_store(files.control_store, files.tokenizer, settings)
    with connect(files.control_store) as session:
        arm = make_arm(model, session, settings, zero_table=True)
        with phases.phase("zero-table control, prose", settings.steps) as on_step:
            arm.train(data.prose, settings.steps, on_step)
        result = _measure(arm, data, settings)
    return replace(result, rows=changed_rows(files.control_store))


def _run_engram(
    files: DemoFiles, model: nn.Module, data: _Data, settings: Settings, phases: Phases
) -> tuple[ArmResult, list[float]]:
    """The memory itself; also returns the loss of every step."""
    losses: list[float] = []
    create_store(files.store, files.tokenizer, settings)
    with connect(files.store) as session:
        arm = make_arm(model, session, settings)
        with phases.phase("Engram, prose", settings.steps) as show:

            def on_step(step: int, loss: float) -> None:
                losses.append(loss)
                show(step, loss)

            arm.train(data.prose, settings.compare_at, on_step)
            arm.save(files.reference)
            arm.train(data.prose, settings.steps, on_step)
        result = _measure(arm, data, settings)
    return replace(result, rows=changed_rows(files.store)), losses


def _interrupt(
    files: DemoFiles, settings: Settings, losses: list[float], phases: Phases
) -> Resumed:
    """The first steps once more, in a process that is killed and another that goes on."""
    create_store(files.killed_store, files.tokenizer, settings)
    steps = settings.kill_after + 1 + settings.compare_at - settings.snapshot_at
    with phases.phase("the same, killed and resumed", steps) as on_step:
        return kill_and_resume(files, settings, losses, on_step)


def _measure(arm: Arm, data: _Data, settings: Settings) -> ArmResult:
    """An arm's counters and perplexities; the model is as before then."""
    arm.memory.session.snapshot()  # what training wrote ends up on disk, and is counted
    stats, guards = arm.memory.session.stats(), arm.memory.guards()
    perplexities = _perplexities(arm.model, data, settings, arm)
    arm.memory.detach()
    return ArmResult(
        perplexities=perplexities,
        guards=guards,
        stats=stats,
        seconds=arm.seconds,
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
