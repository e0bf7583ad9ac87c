"""One run: a fresh copy of the base, with gates over tables on disk, LoRA, both, or all weights."""

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import engram_store
from benchmarks.shape.errors import ShapeError
from benchmarks.shape.variants import Base, Hash, Rows, Run, Variant
from benchmarks.shape.workshop import Workshop, run_settings
from engram_store.bench.machine import describe_machine
from engram_store.recipes import Recipe, compress_vocabulary, engram, engram_peft
from engram_store_client.demo.base import (
    PAD,
    Batches,
    Sequences,
    evaluation_batches,
    loss_of,
    perplexity,
    prepare_torch,
    schedule,
    training_batches,
)
from engram_store_client.demo.settings import Settings
from engram_store_client.demo.tables import changed_rows
from engram_store_client.huggingface import attach
from engram_store_client.memory import Memory
from engram_store_client.transport import connect

_LAST = 50
"""Steps whose mean loss is recorded."""
_DILATION = 3
"""Of the gates' convolution in every run, so that n-gram orders change nothing but rows."""
_MODES = {Base.FROZEN: "engram_only", Base.LORA: "preserve_trainable", Base.FULL: "full"}
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_recipe(variant: Variant, tokenizer_file: Path, seed: int) -> Recipe:
    """How tokens become rows. Both recipes get the same rows, up to the choice of primes."""
    common: dict[str, Any] = {
        "token_map": compress_vocabulary(tokenizer_file),
        "layers": variant.layers,
        "orders": variant.orders,
        "heads": variant.heads,
        "pad_id": PAD,
        "seed": seed,
    }
    if variant.hash is Hash.ENGRAM:
        return engram(**common, rows_per_head=variant.rows_per_head)
    per_order = variant.rows_per_head * variant.heads
    return engram_peft(**common, rows_per_order=[per_order] * len(variant.orders))


@dataclass(eq=False)
class Trained:
    """A model in training, with a memory or without."""

    model: nn.Module
    settings: Settings
    optimizer: torch.optim.Optimizer
    """Each group has a `peak` learning rate. Tables have their own optimiser, in the store."""
    memory: Memory | None
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """Spent in training."""

    def train(self, data: Sequences) -> None:
        """Do all steps."""
        self.model.train()
        start = time.perf_counter()
        batches = training_batches(data, self.settings, 0, self.settings.steps)
        for batch in batches if self.memory is None else self.memory.look_ahead(batches):
            self._step(batch)
        self.seconds += time.perf_counter() - start

    def _step(self, batch: Any) -> None:
        step, settings = len(self.losses), self.settings
        factor = schedule(step, settings.steps)
        loss = loss_of(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        groups = self.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        for group in groups:
            group["lr"] = group["peak"] * factor
        if self.memory is None:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        else:
            self.memory.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.memory is not None:
            self.memory.commit(step, settings.lr * factor * settings.table_factor)
        self.losses.append(loss.item())

    def perplexity(self, held_out: Sequences) -> float:
        """On held-out text, the same for every run."""
        batches: Batches = evaluation_batches(spread(held_out, self.settings), self.settings)
        if self.memory is None:
            return perplexity(self.model, batches)
        return perplexity(self.model, self.memory.look_ahead(batches, train=False))


def spread(held_out: Sequences, settings: Settings) -> Sequences:
    """As many sequences as are evaluated, from all over the held-out files. Pure."""
    count = min(len(held_out), settings.eval_sequences)
    return held_out[np.linspace(0, len(held_out) - 1, count).astype(np.int64)]


def execute(workshop: Workshop, run: Run) -> dict[str, Any]:
    """Do one run.

    Args:
        workshop: base and text; the store of the run lies in its directory until it is measured.
        run: what to do.

    Returns:
        The record, of JSON types.
    """
    start, machine = time.perf_counter(), describe_machine()
    variant = run.variant
    settings = run_settings(
        workshop.settings,
        run.seed,
        layers=variant.layers,
        heads=variant.heads,
        rows_per_head=variant.rows_per_head,
        dim=variant.dim,
        lr=variant.lr,
        steps=variant.steps,
    )
    prepare_torch(settings)
    torch.manual_seed(run.seed)
    with tempfile.TemporaryDirectory(dir=workshop.files.root, prefix="run-") as directory:
        store = Path(directory) / "store.engram"
        with _prepared(workshop, variant, settings, store) as trained:
            perplexity_of = _train_and_evaluate(trained, workshop)
        table = _table(store) if variant.rows is not Rows.ABSENT else None
    return {
        "variant": variant.to_json(),
        "seed": run.seed,
        "settings": asdict(settings),
        "base": workshop.facts,
        "perplexity": perplexity_of,
        "last_losses": fmean(trained.losses[-_LAST:]) if trained.losses else None,
        "steps": len(trained.losses),
        "tokens": len(trained.losses) * settings.batch * settings.time,
        "parameters": _trainable(trained),
        "table": table,
        "seconds": {"training": trained.seconds, "whole": time.perf_counter() - start},
        "machine": machine,
    }


def _train_and_evaluate(trained: Trained, workshop: Workshop) -> dict[str, float]:
    """Perplexities of both domains at the end; the untouched base is only evaluated."""
    if any(group["params"] for group in trained.optimizer.param_groups):
        trained.train(workshop.prose)
    return {
        "prose": trained.perplexity(workshop.held_out_prose),
        "code": trained.perplexity(workshop.held_out_code),
    }


@contextmanager
def _prepared(
    workshop: Workshop, variant: Variant, settings: Settings, path: Path
) -> Iterator[Trained]:
    """The model of a variant; its tables are sealed at the end of the block."""
    model: nn.Module = workshop.base()
    own = _own_parameters(model, variant)
    if variant.rows is Rows.ABSENT:
        yield Trained(model, settings, _optimizer(own, variant.base_lr, (), 0.0), None)
        return
    engram_store.create(
        path,
        make_recipe(variant, workshop.files.tokenizer, settings.seed),
        dim=variant.dim,
        optimizer=settings.optimizer,
        seed=settings.seed,
    )
    with connect(path) as session:
        # As in the demo: biases, or the control could not learn at all, and no identity at the
        # start, or nothing beside rows of zero would get a gradient.
        memory = attach(
            model,
            session,
            gate="engram",
            mode=_MODES[variant.base],
            zero_table=variant.rows is Rows.ZERO,
            bias=True,
            identity_init=False,
            dilation=_DILATION,
        )
        gates = memory.gates.parameters()
        yield Trained(model, settings, _optimizer(own, variant.base_lr, gates, variant.lr), memory)
        memory.detach()


def _own_parameters(model: nn.Module, variant: Variant) -> list[Tensor]:
    """Of the base, those that learn: none, all, or LoRA's, which are put into it."""
    if variant.base is Base.LORA:
        return _add_lora(model, variant)
    trains = variant.base is Base.FULL
    for parameter in model.parameters():
        parameter.requires_grad_(trains)
    return list(model.parameters()) if trains else []


def _add_lora(model: nn.Module, variant: Variant) -> list[Tensor]:
    """Put peft's LoRA into a model, which freezes the rest of it; returns LoRA's weights."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ShapeError(
            f"runs with LoRA need peft, which cannot be imported ({error}); `make install` has it"
        ) from error
    config = LoraConfig(
        r=variant.lora_rank,
        lora_alpha=2 * variant.lora_rank,
        target_modules=list(_LORA_TARGETS),
    )
    inject_adapter_in_model(config, model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _optimizer(
    own: Iterable[Tensor], own_lr: float, gates: Iterable[Tensor], gate_lr: float
) -> torch.optim.Optimizer:
    groups = [
        {"params": list(own), "lr": own_lr, "peak": own_lr},
        {"params": list(gates), "lr": gate_lr, "peak": gate_lr},
    ]
    # AdamW wants at least one group; a base that is only evaluated has an empty one.
    wanted = [group for group in groups if group["params"]] or groups[:1]
    return torch.optim.AdamW(wanted, weight_decay=0.0)


def _trainable(trained: Trained) -> dict[str, int]:
    """Values that the trainer's optimiser changes; those of tables are not among them."""
    gates = trained.memory.gates.parameters() if trained.memory is not None else ()
    every = [p for group in trained.optimizer.param_groups for p in group["params"]]
    of_gates = sum(p.numel() for p in gates)
    return {"gates": of_gates, "base": sum(p.numel() for p in every) - of_gates}


def _table(path: Path) -> dict[str, int]:
    """What lies on disk after a run: the store was closed, which took a snapshot."""
    rows, info = changed_rows(path), engram_store.inspect(path)
    specs = info.metadata.tables.values()
    value_bytes = sum(spec.rows * spec.dim * spec.dtype.storage.itemsize for spec in specs)
    return {
        "rows": rows.total,
        "changed_rows": rows.changed,
        "row_bytes": value_bytes,
        "stored_bytes": sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.is_file()),
    }
