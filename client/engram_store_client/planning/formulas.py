"""How many bytes training takes. Pure arithmetic, each formula with its source.

Parameters are exact. What autograd keeps was read off the code of transformers 5.23 and torch
2.13, with scaled-dot-product attention in its flash form, and is compared with real models in the
tests; other attention keeps more. Axes: b bytes of a value, D hidden size, I inner size of the MLP,
Q and K widths of queries and keys, H heads, M streams, E values of a token's rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memory_plan import MemoryPlan, plan_memory
from engram_store.engine.memtable import slot_bytes
from engram_store.layout.arrays import table_arrays
from engram_store.types import TableSpec
from engram_store_client.planning.models import ModelShape
from engram_store_client.planning.setup import DTYPE_BYTES, Setup

_INT8_BYTES, _NF4_BYTES = 1.0, 0.5 + 4 / 64
"""bitsandbytes: LLM.int8 weights; NF4 with one float32 scale per 64 values."""
_ADAM8_BYTES = 2 * (1 + 4 / 256)
"""bitsandbytes: two moments of one byte, a float32 scale per 256 values of each."""
_UNIQUE_SHARE, _UNIQUE_TOKENS, _UNIQUE_EXPONENT = 0.70, 2048, -0.15
DEFAULT_OVERLAY_BYTES = 1 << 30
"""docs/memory.md: memtables are not larger unless it is asked for."""
_PAGE = 4096
_WRITTEN_SHARE = 2.2
_WINDOWS_IN_CACHE = 1.5
"""docs/memory.md: so many windows of cold pages should fit into the page cache."""


# ---------------------------------------------------------------------------- parameters


def gate_parameters(kind: str, *, hidden: int, row_width: int, streams: int) -> int:
    """Of one layer's gate, as `build_gate` makes it without options.

    Source: `engram_store_client.gates`; ENGRAM paper (arXiv:2601.07372), section 2.3.
    """
    projections = (streams + 1) * hidden * row_width
    if kind == "deepseek-v4.1":
        return projections + 2 * streams * hidden
    norms, taps = 3 * streams * hidden, 4 * streams * hidden
    return projections + norms + taps


def lora_parameters(model: ModelShape, rank: int, targets: Sequence[str]) -> int:
    """Of rank-`rank` adapters of those matrices in every layer (arXiv:2106.09685)."""
    sizes = model.linear_sizes()
    return model.layers * sum(rank * sum(sizes[target]) for target in targets)


def all_gate_parameters(setup: Setup) -> int:
    """Of all layers' gates."""
    return len(setup.tables.specs) * gate_parameters(
        setup.gate_kind,
        hidden=setup.model.hidden,
        row_width=setup.tables.row_width,
        streams=setup.streams,
    )


def trained_bytes(setup: Setup) -> list[tuple[str, int, int]]:
    """(what, parameters, bytes of a value) of everything that the dense optimiser trains."""
    parts = [("gates", all_gate_parameters(setup), setup.gate_bytes)]
    if setup.lora_rank and setup.mode != "engram_only":
        count = lora_parameters(setup.model, setup.lora_rank, setup.lora_targets)
        parts.append(("LoRA", count, setup.lora_bytes))
    if setup.mode == "full":
        parts.append(("base", setup.model.parameters, setup.weight_bytes))
    return parts


def base_bytes(setup: Setup) -> int:
    """Weights of the base; quantisation leaves embeddings and norms as they are.

    With LoRA peft's `prepare_model_for_kbit_training` makes those float32.
    """
    matrices = setup.model.matrix_parameters
    quantised = {"8bit": _INT8_BYTES, "4bit": _NF4_BYTES}.get(setup.quantization)
    widened = quantised is not None and setup.lora_rank > 0
    others = (setup.model.parameters - matrices) * (4 if widened else setup.weight_bytes)
    return int(matrices * (setup.weight_bytes if quantised is None else quantised)) + others


def optimizer_bytes(kind: str, parameters: int, value_bytes: int) -> int:
    """State of a dense optimiser: torch keeps AdamW's moments in the parameters' dtype."""
    per_value = {"adamw": 2.0 * value_bytes, "adamw_8bit": _ADAM8_BYTES, "sgd": 0.0}[kind]
    return int(parameters * per_value)


# ---------------------------------------------------------------------------- activations


def layer_activation_bytes(setup: Setup) -> int:
    """What autograd keeps of one decoder layer for one token.

    A frozen matrix needs its weight alone for its backward pass; a trained one its input too.
    """
    model, b = setup.model, setup.weight_bytes
    hidden, inner = model.hidden, model.intermediate
    queries, keys = model.query_width, model.key_width
    # Inputs and factors of the norms, which work in float32.
    kept = model.layer_norms * (4 * hidden + 4)
    if model.qk_norm:
        kept += 4 * (queries + keys) + 4 * (model.heads + model.kv_heads)
    # Queries, keys, values and the output of attention, and its log-sum-exp.
    kept += b * 2 * (queries + keys) + 4 * model.heads
    if model.softcapped:  # computed score by score: softmax in float32, and its argument
        kept += 8 * model.heads * setup.time
    # The gate before and after its activation, and the other factor.
    kept += 3 * b * inner
    if setup.mode == "full":
        normed = 4 if model.norms_in_fp32 else b
        kept += model.layer_norms * normed * hidden
        kept += normed * (queries + keys) * model.qk_norm
        kept += b * (2 * hidden + inner)  # inputs of the matrices; attention's output is there
    return kept + _lora_activation_bytes(setup)


def _lora_activation_bytes(setup: Setup) -> int:
    """Inputs of LoRA's matrices, which PEFT copies into LoRA's dtype, one copy for each target."""
    if not setup.lora_rank or setup.mode == "engram_only":
        return 0
    sizes, targets = setup.model.linear_sizes(), set(setup.lora_targets)
    narrow = setup.lora_rank * setup.lora_bytes * len(targets)
    if setup.lora_bytes != setup.weight_bytes:
        return narrow + sum(sizes[target][0] * setup.lora_bytes for target in targets)
    if setup.mode == "full":
        return narrow  # the inputs are kept already
    kept = setup.model.hidden * bool(targets & {"q_proj", "k_proj", "v_proj"})
    kept += setup.model.hidden * bool(targets & {"gate_proj", "up_proj"})
    kept += setup.model.intermediate * ("down_proj" in targets)
    return narrow + kept * setup.weight_bytes


def gate_activation_bytes(setup: Setup) -> int:
    """What autograd keeps of one gate for one token."""
    b, hidden, streams = setup.gate_bytes, setup.model.hidden, setup.streams
    rows = b * setup.tables.row_width
    if setup.gate_kind == "deepseek-v4.1":
        # Keys and value, hidden states and their weighted product, in float32.
        return rows + 4 * hidden * (streams + 1 + 2 * streams) + 36 * streams
    # Of each stream: keys, query, their norms and product, the gated value, its norm, and what
    # goes into and comes out of the convolution.
    each = 24 + 4 * b if setup.gate_kind == "qwen3.8-ple" else 12 + 7 * b
    return rows + hidden * b + streams * (hidden * each + 5 * b + 8)


def layers_with_gradients(setup: Setup) -> int:
    """Decoder layers whose activations are kept.

    With a frozen base no gradient is needed below the first layer that looks up rows.
    """
    if setup.mode == "engram_only":
        return setup.model.layers - min(spec.layer for spec in setup.tables.specs)
    return setup.model.layers


def kept_activation_bytes(setup: Setup) -> int:
    """All that is kept between a forward pass and its backward pass, logits aside."""
    layers = min(layers_with_gradients(setup), setup.model.layers)
    final_norm = 4 * setup.model.hidden + 4
    if setup.mode == "full":
        final_norm += 2 * setup.weight_bytes * setup.model.hidden
    if setup.checkpointing:
        return setup.tokens * (layers * setup.weight_bytes * setup.model.hidden + final_norm)
    gates = len(setup.tables.specs) * gate_activation_bytes(setup)
    return setup.tokens * (layers * layer_activation_bytes(setup) + gates + final_norm)


def logits_bytes(setup: Setup) -> int:
    """Logits at the peak of the loss.

    Beside them, as float32: log-softmax, and the gradients of its output and of its input.
    """
    return setup.tokens * setup.model.vocabulary * (setup.weight_bytes + 3 * 4)


def backward_work_bytes(setup: Setup) -> int:
    """What comes and goes while the layers' backward passes run: an estimate.

    Gradients of the MLP's factors and of a norm in float32; the logits, which stay in the model's
    output; with checkpointing also what is computed again, gate included.
    """
    model, b = setup.model, setup.weight_bytes
    work = 3 * b * model.intermediate + 6 * model.hidden + b * model.vocabulary
    if setup.checkpointing:
        work += layer_activation_bytes(setup) + gate_activation_bytes(setup)
    return setup.tokens * work


def gradient_bytes(setup: Setup) -> int:
    """Gradients of everything but the tables, as far as they come on top of the activations.

    In a step of one micro-batch they grow while activations go, so that only the larger of the
    two counts; later micro-batches find them there.
    """
    gradients = sum(count * size for _, count, size in trained_bytes(setup))
    if setup.accumulate > 1:
        return gradients
    work, kept = backward_work_bytes(setup), kept_activation_bytes(setup)
    return max(gradients + work - kept - max(work, logits_bytes(setup)), 0)


# ---------------------------------------------------------------------------- rows


def unique_rows(tokens: int, columns: int, rows: int) -> int:
    """Different rows that a window looks up in one table: an estimate.

    Of prose and code, cut by tokenizers of 4 k and 32 k ids, 0.86 of the look-ups are different
    among 512 tokens, 0.70 among 2,048, 0.48 among 16,384, 0.38 among 131,072. Text that repeats
    itself has fewer; the bound is one row for each look-up.
    """
    share = _UNIQUE_SHARE * (tokens / _UNIQUE_TOKENS) ** _UNIQUE_EXPONENT
    return min(int(tokens * columns * min(share, 1.0)), rows)


def window_rows(setup: Setup, tokens: int | None = None) -> list[tuple[TableSpec, int]]:
    """Each table with the different rows of a window: of one micro-batch, or so many tokens."""
    count, columns = tokens or setup.tokens, setup.tables.columns
    return [(spec, unique_rows(count, columns, spec.rows)) for spec in setup.tables.specs]


def open_windows(setup: Setup) -> int:
    """Windows that are on the device at a time: those of a step until its commit, and the next."""
    return setup.accumulate + 1


def device_row_bytes(setup: Setup) -> int:
    """Rows on the device, and the gradients of a step: unique rows, whatever the tables' size."""
    total = 0
    for spec, count in window_rows(setup):
        one = count * spec.row_bytes + 4 * setup.tokens * setup.tables.columns
        if DTYPE_BYTES[str(spec.dtype)] != setup.gate_bytes:
            one += count * spec.dim * setup.gate_bytes
        total += open_windows(setup) * one
        total += setup.accumulate * count * spec.dim * setup.gate_bytes
    return total


def pinned_bytes(setup: Setup) -> tuple[int, int]:
    """(rows on their way to the trainer, gradients on their way back) in memory that is shared.

    Windows stay until the commit of their step; others are announced ahead. Gradients travel as
    bfloat16 or float32.
    """
    rows = gradients = 0
    for spec, count in window_rows(setup):
        inverse = 4 * setup.tokens * setup.tables.columns
        rows += (setup.accumulate + setup.look_ahead) * (count * spec.row_bytes + inverse)
        value_bytes = 2 if (setup.gate_dtype or setup.dtype) == "bfloat16" else 4
        gradients += setup.accumulate * count * spec.dim * value_bytes
    return rows, gradients


# ---------------------------------------------------------------------------- the store


def store_memory(setup: Setup) -> tuple[MemoryPlan, int | None]:
    """The smallest memory setting with which the store trains this well.

    Its own division of memory (docs/memory.md), with page cache for 1.5 windows of cold pages,
    and memtables that hold the rows of a step.

    Returns:
        The division, and the `overlay_bytes` that it needs; None: the default does.
    """
    step_tokens = setup.tokens * setup.accumulate
    pages = sum(_PAGE * count for _, count in window_rows(setup))
    most = max(count for _, count in window_rows(setup, step_tokens))
    return _store_memory(tuple(setup.tables.specs), int(_WINDOWS_IN_CACHE * pages), most)


@lru_cache(maxsize=1024)
def _store_memory(
    specs: tuple[TableSpec, ...], pages: int, step_rows: int
) -> tuple[MemoryPlan, int | None]:
    slots = -(-step_rows // BLOCK_SLOTS) * BLOCK_SLOTS
    overlay: int | None = 2 * slots * slot_bytes(list(specs))
    if overlay is not None and overlay <= DEFAULT_OVERLAY_BYTES:
        overlay = None
    limit = 1 << 22
    while True:
        plan = plan_memory(specs, limit, overlay_bytes=overlay)
        if plan.fits and plan.page_cache_bytes >= pages and plan.capacity >= step_rows:
            return plan, overlay
        limit += limit // 16


def table_bytes(spec: TableSpec) -> int:
    """One base generation of a table with all chunks written, rows and state."""
    return sum(array.chunks * array.chunk_bytes for array in table_arrays(spec))


def slot_disk_bytes(spec: TableSpec) -> int:
    """One row in a segment: its id, its values, its state."""
    return 4 + spec.row_bytes + spec.state_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskUse:
    """One table's files, in bytes; all but the first at worst."""

    base: int
    """A base generation with all its chunks."""
    segments: int
    fold: int
    """A new generation beside the old one; 0: the steps do not reach a fold."""
    snapshots: int
    """What snapshots keep that the newest state does not need."""


def disk_use(setup: Setup, spec: TableSpec, capacity: int) -> DiskUse:
    """What a table takes on the disk.

    It is folded when its segments hold as many rows as it has; what is sealed meanwhile comes on
    top. Files are never changed, so everything that was ever written is an upper bound: 1.1 bytes
    for each byte of rows that were updated, 2.2 with merges (docs/performance.md), and a base for
    every fold.

    Args:
        setup: the run.
        spec: the table.
        capacity: slots of a memtable.
    """
    base, slot = table_bytes(spec), slot_disk_bytes(spec)
    segments = (spec.rows + 2 * min(capacity, spec.rows)) * slot
    kept = setup.snapshots * (base + segments)
    if setup.steps is None:
        return DiskUse(base=base, segments=segments, fold=base, snapshots=kept)
    step_tokens = setup.tokens * setup.accumulate
    updates = setup.steps * unique_rows(step_tokens, setup.tables.columns, spec.rows)
    folds = updates // spec.rows
    written = int(_WRITTEN_SHARE * updates * slot) + folds * base
    return DiskUse(
        base=base,
        segments=min(segments, updates * slot),
        fold=base if folds else 0,
        snapshots=min(kept, written) if setup.snapshots else 0,
    )
