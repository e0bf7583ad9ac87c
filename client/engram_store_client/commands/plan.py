"""`engram-store plan`: what a training run takes, before it starts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engram_store_client.planning import Limits, ModelShape, Setup, TableShape

_TABLES = "Tables, unless --store names them"
_TRAINING = "How it trains"
_MACHINE = "What there is. Default: what this machine has"


def plan(
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A config.json, a model directory, or a name on the hub."),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="hidden=2560,...", help="The model's sizes, in place of --model."),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="A store's directory: its tables.")] = None,
    recipe: Annotated[str, typer.Option(rich_help_panel=_TABLES)] = "engram",
    layers: Annotated[
        str, typer.Option(metavar="1,9", help="Model layers.", rich_help_panel=_TABLES)
    ] = "1",
    rows_per_head: Annotated[
        int, typer.Option(help="Rows of one hash head.", rich_help_panel=_TABLES)
    ] = 646_400,
    heads: Annotated[int, typer.Option(help="Of each order.", rich_help_panel=_TABLES)] = 8,
    orders: Annotated[str, typer.Option(metavar="2,3", rich_help_panel=_TABLES)] = "2,3",
    dim: Annotated[int, typer.Option(help="Values of a row.", rich_help_panel=_TABLES)] = 64,
    row_dtype: Annotated[str, typer.Option(rich_help_panel=_TABLES)] = "bfloat16",
    table_optimizer: Annotated[str, typer.Option(rich_help_panel=_TABLES)] = "rowwise_adagrad",
    mode: Annotated[
        str,
        typer.Option(help="engram_only, preserve_trainable or full.", rich_help_panel=_TRAINING),
    ] = "engram_only",
    lora_rank: Annotated[int, typer.Option(help="0: no LoRA.", rich_help_panel=_TRAINING)] = 0,
    batch: Annotated[
        int, typer.Option(help="Sequences of a micro-batch.", rich_help_panel=_TRAINING)
    ] = 1,
    time: Annotated[
        int, typer.Option(help="Tokens of a sequence.", rich_help_panel=_TRAINING)
    ] = 2048,
    accumulate: Annotated[
        int, typer.Option(help="Micro-batches of a step.", rich_help_panel=_TRAINING)
    ] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of the base.", rich_help_panel=_TRAINING)
    ] = "bfloat16",
    quantization: Annotated[
        str, typer.Option(help="Of the base: none, 8bit or 4bit.", rich_help_panel=_TRAINING)
    ] = "none",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Of gradients.", rich_help_panel=_TRAINING)
    ] = False,
    optimizer: Annotated[
        str,
        typer.Option(help="Of the rest: adamw, adamw_8bit or sgd.", rich_help_panel=_TRAINING),
    ] = "adamw",
    steps: Annotated[
        int | None,
        typer.Option(help="Bounds what is written. Default: any.", rich_help_panel=_TRAINING),
    ] = None,
    snapshots: Annotated[
        int, typer.Option(help="Kept of the store.", rich_help_panel=_TRAINING)
    ] = 3,
    checkpoints: Annotated[
        int, typer.Option(help="Kept of the trainer.", rich_help_panel=_TRAINING)
    ] = 2,
    vram: Annotated[str | None, typer.Option(metavar="24GB", rich_help_panel=_MACHINE)] = None,
    memory: Annotated[str | None, typer.Option(metavar="64GB", rich_help_panel=_MACHINE)] = None,
    disk: Annotated[str | None, typer.Option(metavar="1TB", rich_help_panel=_MACHINE)] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda or cpu. Default: cuda where VRAM is known.", rich_help_panel=_MACHINE
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a training run takes: VRAM, memory and disk, part by part, before it starts.

    Needs no torch and reads no weights. Exit code 2: it cannot fit; what would is printed.
    """
    from engram_store_client.planning import Setup

    limits = _limits(vram, memory, disk, store or Path())
    setup = Setup(
        model=_model(model, sizes),
        tables=_tables(
            store,
            recipe=recipe,
            layers=layers,
            rows_per_head=rows_per_head,
            heads=heads,
            orders=orders,
            dim=dim,
            dtype=row_dtype,
            optimizer=table_optimizer,
        ),
        mode=mode,
        lora_rank=lora_rank,
        batch=batch,
        time=time,
        accumulate=accumulate,
        dtype=dtype,
        quantization=quantization,
        checkpointing=checkpointing,
        optimizer=optimizer,
        steps=steps,
        snapshots=snapshots,
        checkpoints=checkpoints,
        device=device or ("cpu" if limits.vram is None else "cuda"),
    )
    _print(setup, limits, as_json=json)


def _print(setup: "Setup", limits: "Limits", *, as_json: bool) -> None:
    """Raises: typer.Exit: it does not fit."""
    from engram_store_client.planning import alternatives, make_plan
    from engram_store_client.planning.report import alternatives_text

    made = make_plan(setup, limits)
    others = [] if made.fits else alternatives(setup, limits)
    if as_json:
        from json import dumps

        told = [{"change": text, **other.to_json()} for text, other in others]
        typer.echo(dumps({**made.to_json(), "would_fit": told}, indent=2))
    else:
        typer.echo(str(made))
        if not made.fits:
            typer.echo(alternatives_text(others))
    if not made.fits:
        raise typer.Exit(2)


def _limits(vram: str | None, memory: str | None, disk: str | None, place: Path) -> "Limits":
    """What was given, and what this machine has of the rest."""
    from dataclasses import replace

    from engram_store_client.planning import Limits, parse_size

    given = {"vram": vram, "memory": memory, "disk": disk}
    sizes = {name: parse_size(text, f"--{name}") for name, text in given.items() if text}
    return replace(Limits.of_machine(place), **sizes)


def _model(path: str | None, sizes: str | None) -> "ModelShape":
    """Raises: typer.BadParameter: not exactly one of the two."""
    from engram_store_client.planning import ModelShape, read_model

    if (path is None) == (sizes is None):
        raise typer.BadParameter(
            "give a model by --model DIR, or its sizes by --sizes hidden=...,layers=...",
            param_hint="--model",
        )
    return ModelShape.parse(sizes) if sizes is not None else read_model(path or "")


def _tables(
    store: Path | None,
    *,
    recipe: str,
    layers: str,
    rows_per_head: int,
    heads: int,
    orders: str,
    dim: int,
    dtype: str,
    optimizer: str,
) -> "TableShape":
    from engram_store_client.planning import TableShape, tables_of_store

    if store is not None:
        return tables_of_store(store)
    return TableShape(
        recipe=recipe,
        layers=_numbers("--layers", layers),
        rows_per_head=rows_per_head,
        heads=heads,
        orders=_numbers("--orders", orders),
        dim=dim,
        dtype=dtype,
        optimizer=optimizer,
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers such as 1,14", param_hint=option
        ) from None
