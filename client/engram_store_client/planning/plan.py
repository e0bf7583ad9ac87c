"""The memory plan of a training run: every part of it, by resource, against what there is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engram_store.cli.output import plural
from engram_store_client.planning import formulas
from engram_store_client.planning.machine import Limits
from engram_store_client.planning.setup import Setup

VRAM, MEMORY, DISK = "VRAM", "memory", "disk"
RESOURCES = (VRAM, MEMORY, DISK)
_CUDA_CONTEXT_BYTES = 600 << 20
"""Driver, kernels and cuBLAS workspaces of one process: 0.4 to 0.7 GB are usual."""
_FRAGMENTATION = 0.05
"""Of what comes and goes, lost to the allocator's blocks."""
_TRAINER_BYTES = {"cuda": 3 << 30, "cpu": 800 << 20}
"""Python, torch, transformers and their libraries; with CUDA's on the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One part of a plan."""

    resource: str
    part: str
    bytes: int
    exact: bool = True
    """False: an estimate."""
    pinned: bool = False
    """Memory that is registered with the device, and so never paged out."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run takes. `make_plan` makes it."""

    setup: Setup
    limits: Limits
    lines: tuple[Line, ...]
    overlay_bytes: int | None
    """For `engram_store.open`: memtables must be larger than the default; None: they need not."""

    def total(self, resource: str) -> int:
        """Bytes of one resource."""
        return sum(line.bytes for line in self.lines if line.resource == resource)

    def limit(self, resource: str) -> int | None:
        """What there is of it; None: unknown."""
        limits = self.limits
        return {VRAM: limits.vram, MEMORY: limits.memory, DISK: limits.disk}[resource]

    @property
    def pinned_bytes(self) -> int:
        """Pinned memory, which is part of memory."""
        return sum(line.bytes for line in self.lines if line.pinned)

    def short_of(self) -> tuple[str, ...]:
        """Resources of which there is too little."""
        return tuple(
            resource
            for resource in RESOURCES
            if (limit := self.limit(resource)) is not None and self.total(resource) > limit
        )

    @property
    def fits(self) -> bool:
        """Whether nothing is short."""
        return not self.short_of()

    def to_json(self) -> dict[str, Any]:
        """As JSON types: parts, totals and limits in bytes, parameters as counts."""
        setup, tables = self.setup, self.setup.tables
        return {
            "fits": self.fits,
            "short_of": list(self.short_of()),
            "parameters": {
                "base": setup.model.parameters,
                "gates": formulas.all_gate_parameters(setup),
                "tables": tables.parameters,
                "trained_dense": sum(count for _, count, _ in formulas.trained_bytes(setup)),
            },
            "totals": {resource: self.total(resource) for resource in RESOURCES},
            "limits": {resource: self.limit(resource) for resource in RESOURCES},
            "pinned_bytes": self.pinned_bytes,
            "overlay_bytes": self.overlay_bytes,
            "parts": [
                {
                    "resource": line.resource,
                    "part": line.part,
                    "bytes": line.bytes,
                    "exact": line.exact,
                    "pinned": line.pinned,
                    "note": line.note,
                }
                for line in self.lines
            ],
        }

    def __str__(self) -> str:
        from engram_store_client.planning.report import plan_text

        return plan_text(self)


def make_plan(setup: Setup, limits: Limits | None = None) -> Plan:
    """What a run takes, against what there is. Pure, apart from looking at the machine.

    Args:
        setup: the run.
        limits: what may be used; None: what this machine has.

    Raises:
        ConfigError: tables that cannot be.
    """
    store, overlay_bytes = formulas.store_memory(setup)
    lines = [*_weights(setup), *_passes(setup), *_rows(setup)]
    lines += _memory(setup, store.store_bytes, store.page_cache_bytes)
    lines += _disk(setup, store.capacity)
    return Plan(
        setup=setup,
        limits=Limits.of_machine() if limits is None else limits,
        lines=tuple(lines),
        overlay_bytes=overlay_bytes,
    )


def _device(setup: Setup) -> str:
    """Where the model computes: a CPU has no VRAM of its own."""
    return VRAM if setup.device == "cuda" else MEMORY


def _weights(setup: Setup) -> Iterator[Line]:
    """Weights, gradients and optimiser."""
    device, trained = _device(setup), formulas.trained_bytes(setup)
    quantised = setup.quantization != "none"
    dtype = f"{setup.dtype}, matrices {setup.quantization}" if quantised else setup.dtype
    yield Line(
        resource=device,
        part="base weights",
        bytes=formulas.base_bytes(setup),
        note=dtype,
        exact=not quantised,
    )
    for name, count, size in trained:
        if name != "base":
            yield Line(
                resource=device,
                part=f"{name} weights",
                bytes=count * size,
                note=f"{count:,} parameters",
            )
    if setup.autocast and setup.weight_bytes == 4:
        yield Line(
            resource=device,
            part="half-precision weight copies",
            exact=False,
            bytes=2 * setup.model.matrix_parameters,
            note="kept by autocast during a pass",
        )
    what = ", ".join(name for name, _, _ in trained)
    yield Line(
        resource=device,
        part="gradients",
        bytes=formulas.gradient_bytes(setup),
        exact=setup.accumulate > 1,
        note=f"of {what}, beyond the activations that they follow",
    )
    state = sum(
        formulas.optimizer_bytes(setup.optimizer, count, size) for _, count, size in trained
    )
    yield Line(
        resource=device,
        part="optimiser state",
        bytes=state,
        exact=setup.optimizer != "adamw_8bit",
        note=f"{setup.optimizer} of {what}",
    )


def _passes(setup: Setup) -> Iterator[Line]:
    """What a forward and a backward pass take."""
    device, kept = _device(setup), formulas.kept_activation_bytes(setup)
    how = "with" if setup.checkpointing else "without"
    yield Line(
        resource=device,
        part="activations",
        bytes=kept,
        exact=False,
        note=f"{setup.batch} x {setup.time:,} tokens, {how} checkpointing",
    )
    logits, work = formulas.logits_bytes(setup), formulas.backward_work_bytes(setup)
    name = "logits and loss" if logits >= work else "logits, a layer's backward"
    peak = max(logits, work)
    yield Line(resource=device, part=name, bytes=peak, exact=False, note="at the peak")
    rows = formulas.device_row_bytes(setup)
    yield Line(
        resource=device,
        part=f"rows of {formulas.open_windows(setup)} windows",
        bytes=rows,
        exact=False,
        note="and gradients; whatever the size of the tables",
    )
    if setup.device == "cuda":
        lost = int(_FRAGMENTATION * (kept + peak + rows))
        yield Line(
            resource=VRAM,
            part="CUDA context, fragmentation",
            exact=False,
            bytes=_CUDA_CONTEXT_BYTES + lost,
        )


def _rows(setup: Setup) -> Iterator[Line]:
    """Rows and gradients on their way, shared with the store."""
    rows, gradients = formulas.pinned_bytes(setup)
    count = formulas.window_rows(setup)[0][1]
    most = setup.tokens * setup.tables.columns
    windows = setup.accumulate + setup.look_ahead
    pinned = setup.device == "cuda"
    yield Line(
        resource=MEMORY,
        part="ring: rows",
        bytes=rows,
        exact=False,
        pinned=pinned,
        note=f"{windows} windows; ~{count:,} rows a table, {most:,} at most",
    )
    yield Line(
        resource=MEMORY,
        part="ring: gradients",
        bytes=gradients,
        exact=False,
        pinned=pinned,
        note=f"of {plural(setup.accumulate, 'window')}",
    )


def _memory(setup: Setup, store_bytes: int, page_cache_bytes: int) -> Iterator[Line]:
    yield Line(
        resource=MEMORY,
        part="trainer process",
        bytes=_TRAINER_BYTES[setup.device],
        exact=False,
        note="Python, torch, libraries",
    )
    yield Line(
        resource=MEMORY,
        part="store, at least",
        bytes=store_bytes,
        note="indexes, memtables, windows ahead: docs/memory.md",
    )
    yield Line(
        resource=MEMORY,
        part="page cache, at least",
        bytes=page_cache_bytes,
        exact=False,
        note="1.5 windows of cold pages; more makes steps faster",
    )


def _disk(setup: Setup, capacity: int) -> Iterator[Line]:
    """Everything at worst: with as many rows trained as the steps can reach, and a fold."""
    specs = setup.tables.specs
    uses = [formulas.disk_use(setup, spec, capacity) for spec in specs]
    states = {str(spec.optimizer) for spec in specs}
    yield Line(
        resource=DISK,
        part="tables",
        bytes=sum(use.base for use in uses),
        note=f"{len(specs)} with the state of {', '.join(sorted(states))}",
    )
    yield Line(
        resource=DISK,
        part="segments, at most",
        bytes=sum(use.segments for use in uses),
        exact=False,
        note="rows updated since the last fold",
    )
    yield Line(
        resource=DISK,
        part="a fold under way",
        bytes=max(use.fold for use in uses),
        exact=False,
        note="the new generation of the largest table",
    )
    yield Line(
        resource=DISK,
        part="snapshots kept, at most",
        exact=False,
        bytes=sum(use.snapshots for use in uses),
        note=f"{setup.snapshots}; each shares what did not change since",
    )
    yield from _checkpoints(setup)


def _checkpoints(setup: Setup) -> Iterator[Line]:
    """A Trainer saves whole models, frozen parts too; of a model with LoRA the adapters alone."""
    trained = formulas.trained_bytes(setup)
    one = sum(
        count * size + formulas.optimizer_bytes(setup.optimizer, count, size)
        for _, count, size in trained
    )
    what = "gates and LoRA"
    if not setup.lora_rank:
        what = "the model with its gates"
        one += formulas.base_bytes(setup) * (setup.mode != "full")
    yield Line(
        resource=DISK,
        part="checkpoints of the trainer",
        bytes=setup.checkpoints * one,
        exact=False,
        note=f"{setup.checkpoints}; {what}, the optimiser",
    )
