"""A plan as text of 80 columns."""

from collections.abc import Iterator, Sequence

from engram_store.cli.output import size_text
from engram_store_client.planning import formulas
from engram_store_client.planning.plan import RESOURCES, Line, Plan
from engram_store_client.planning.setup import Setup

_WIDTH = 80
_PART, _SIZE = 28, 9


def plan_text(plan: Plan) -> str:
    """Every part, the totals, and whether it fits; `~` marks estimates."""
    return "\n".join([*_head(plan.setup), *_resources(plan), *_verdict(plan)])


def _head(setup: Setup) -> Iterator[str]:
    model, tables = setup.model, setup.tables
    layers = ", ".join(str(spec.layer) for spec in tables.specs)
    yield (
        f"base    {count_text(model.parameters)} parameters ({model.family}, {model.layers} layers "
        f"of {model.hidden}), {_trained(setup)}"
    )
    yield (
        f"tables  {count_text(tables.parameters)} parameters in layers {layers}: "
        f"{sum(spec.rows for spec in tables.specs):,} rows of {tables.dim} {tables.dtype}"
    )
    yield (
        f"gates   {count_text(formulas.all_gate_parameters(setup))} parameters ({setup.gate_kind})"
    )
    yield (
        f"step    {setup.batch} x {setup.time:,} tokens"
        + (f", {setup.accumulate} times" if setup.accumulate > 1 else "")
        + (", gradient checkpointing" if setup.checkpointing else "")
        + f", {setup.device}"
    )


def _trained(setup: Setup) -> str:
    if setup.mode == "full":
        return "trained"
    return f"frozen, LoRA rank {setup.lora_rank}" if setup.lora_rank else "frozen"


def _resources(plan: Plan) -> Iterator[str]:
    for resource in RESOURCES:
        lines = [line for line in plan.lines if line.resource == resource and line.bytes]
        if not lines:
            continue
        yield ""
        yield _total(plan, resource)
        yield from (_line(line) for line in sorted(lines, key=lambda line: -line.bytes))
    if plan.pinned_bytes:
        yield f"\nPinned, of the memory: ~{size_text(plan.pinned_bytes)}"


def _total(plan: Plan, resource: str) -> str:
    limit = plan.limit(resource)
    of = "" if limit is None else f" of {size_text(limit)}"
    lack = "   TOO MUCH" if resource in plan.short_of() else ""
    return f"{resource[0].upper() + resource[1:]}: {size_text(plan.total(resource))}{of}{lack}"


def _line(line: Line) -> str:
    size = ("" if line.exact else "~") + size_text(line.bytes)
    text = f"  {line.part:<{_PART}} {size:>{_SIZE + 1}}  {line.note}"
    return text.rstrip() if len(text) <= _WIDTH else _wrapped(text)


def _wrapped(text: str) -> str:
    """The note goes on below itself."""
    indent = 2 + _PART + 1 + _SIZE + 1 + 2
    line, lines = text[:indent], []
    for word in text[indent:].split():
        if len(line) + len(word) > _WIDTH and line.strip():
            lines.append(line.rstrip())
            line = " " * indent
        line += word + " "
    return "\n".join([*lines, line.rstrip()])


def _verdict(plan: Plan) -> Iterator[str]:
    yield ""
    if plan.overlay_bytes is not None:
        yield (
            f"A step updates more rows than memtables of the usual size hold: open the store with "
            f"overlay_bytes={plan.overlay_bytes:,}."
        )
    yield "It fits." if plan.fits else "It does not fit: " + refusal_text(plan)


def refusal_text(plan: Plan) -> str:
    """Of what there is too little, and by how much."""
    parts = []
    for resource in plan.short_of():
        limit, needed = plan.limit(resource), plan.total(resource)
        assert limit is not None
        parts.append(
            f"{size_text(needed)} of {resource} are needed and there are {size_text(limit)}"
        )
    return ", ".join(parts) + "."


def count_text(count: int) -> str:
    """Parameters for people: '4.02 B'."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def alternatives_text(alternatives: Sequence[tuple[str, Plan]]) -> str:
    """What would fit, one line each; or that nothing does."""
    if not alternatives:
        return (
            "Nothing that could be changed makes it fit: take a smaller model, or a larger machine."
        )
    lines = ["What would fit:"]
    for text, plan in alternatives:
        totals = ", ".join(
            f"{size_text(plan.total(resource))} {resource}"
            for resource in RESOURCES
            if plan.total(resource)
        )
        lines.append(f"  {text}\n      ({totals})")
    return "\n".join(lines)
