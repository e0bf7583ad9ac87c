"""`engram-store create`: make a store."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from engram_store.recipes import Recipe


class _Initial(StrEnum):
    ZEROS = "zeros"
    NORMAL = "normal"


class _Family(StrEnum):
    """`recipes.Family`, without importing it to show the help."""

    ENGRAM = "engram"
    ENGRAM_PEFT = "engram-peft"
    DEEPSEEK_V41 = "deepseek-v4.1"
    QWEN_PLE = "qwen3.8-ple"


_HASH = "How tokens become rows"
_ROWS = "What a row is"


def create(
    directory: Annotated[Path, typer.Argument(help="Directory to make.")],
    recipe: Annotated[_Family, typer.Option(help="The published recipe.", rich_help_panel=_HASH)],
    layers: Annotated[
        str,
        typer.Option(metavar="1,14", help="Model layers that read a table.", rich_help_panel=_HASH),
    ],
    rows_per_head: Annotated[
        str,
        typer.Option(
            metavar="N[,N]",
            help="Wanted rows of one hash head, for all orders or for each.",
            rich_help_panel=_HASH,
        ),
    ],
    dim: Annotated[int, typer.Option(help="Values of a row.", rich_help_panel=_ROWS)],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json; all recipes but qwen's.", rich_help_panel=_HASH),
    ] = None,
    orders: Annotated[
        str, typer.Option(metavar="2,3", help="Lengths of n-grams.", rich_help_panel=_HASH)
    ] = "2,3",
    heads: Annotated[
        int, typer.Option(help="Hash heads of each order.", rich_help_panel=_HASH)
    ] = 8,
    pad_id: Annotated[
        int | None,
        typer.Option(
            help="Raw id that stands before a text. Without it: the tokenizer's padding token.",
            rich_help_panel=_HASH,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="The model's hash seed. Without it: the recipe's own.", rich_help_panel=_HASH
        ),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(help="Number of raw ids; qwen's recipe only.", rich_help_panel=_HASH),
    ] = None,
    eos_id: Annotated[
        int | None,
        typer.Option(help="Id that ends a text; qwen's recipe only.", rich_help_panel=_HASH),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16 or float32.", rich_help_panel=_ROWS)
    ] = "bfloat16",
    optimizer: Annotated[
        str,
        typer.Option(help="rowwise_adagrad, adagrad, adam or sgd.", rich_help_panel=_ROWS),
    ] = "rowwise_adagrad",
    init: Annotated[
        _Initial,
        typer.Option(help="Initial rows. Zeros take no disk.", rich_help_panel=_ROWS),
    ] = _Initial.ZEROS,
    std: Annotated[
        float, typer.Option(help="Of normal initial rows.", rich_help_panel=_ROWS)
    ] = 0.02,
    init_seed: Annotated[
        int, typer.Option(help="Of normal initial rows.", rich_help_panel=_ROWS)
    ] = 0,
    on_nonfinite: Annotated[
        str,
        typer.Option(help="NaN in a gradient: reject, skip or accept.", rich_help_panel=_ROWS),
    ] = "reject",
    stochastic_rounding: Annotated[
        bool, typer.Option(help="Of bfloat16 rows.", rich_help_panel=_ROWS)
    ] = True,
    rounding_seed: Annotated[
        int, typer.Option(help="Of stochastic rounding.", rich_help_panel=_ROWS)
    ] = 0,
) -> None:
    """Make a store with one table per layer."""
    typer.echo(f"Making {directory} ...")
    import engram_store
    from engram_store.cli.progress import byte_progress

    hashing = _recipe(
        recipe,
        tokenizer=tokenizer,
        layers=_numbers("--layers", layers),
        rows_per_head=_numbers("--rows-per-head", rows_per_head),
        orders=_numbers("--orders", orders),
        heads=heads,
        pad_id=pad_id,
        seed=seed,
        vocabulary=vocabulary,
        eos_id=eos_id,
    )
    normal = engram_store.Normal(std=std, seed=init_seed) if init is _Initial.NORMAL else None
    with byte_progress("Initial rows") as progress:
        engram_store.create(
            directory,
            hashing,
            dim=dim,
            dtype=dtype,
            optimizer=optimizer,
            initial=normal,
            stochastic_rounding=stochastic_rounding,
            on_nonfinite=on_nonfinite,
            seed=rounding_seed,
            progress=progress,
        )
    from engram_store.cli.inspect import print_description
    from engram_store.layout.inspect import description_json

    print_description(str(directory), description_json(engram_store.inspect(directory)))
    typer.echo(f"Next: engram_store.open({str(directory)!r}, mode='train') in your training script")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers such as 1,14", param_hint=option
        ) from None


def _recipe(
    family: _Family,
    *,
    tokenizer: Path | None,
    layers: list[int],
    rows_per_head: list[int],
    orders: list[int],
    heads: int,
    pad_id: int | None,
    seed: int | None,
    vocabulary: int | None,
    eos_id: int | None,
) -> "Recipe":
    """The recipe that the options describe."""
    from engram_store import recipes

    common: dict[str, Any] = {"layers": layers, "heads": heads}
    seeded: dict[str, Any] = {} if seed is None else {"seed": seed}
    if family is _Family.QWEN_PLE:
        _refuse(family, tokenizer=tokenizer, pad_id=pad_id)
        return recipes.qwen_ple(
            vocabulary=_needed("--vocabulary", vocabulary, family),
            rows_per_head=_single(rows_per_head, family),
            eos_id=_needed("--eos-id", eos_id, family),
            orders=orders,
            **common,
            **seeded,
        )
    _refuse(family, vocabulary=vocabulary, eos_id=eos_id)
    loaded = _load_tokenizer(_needed("--tokenizer", tokenizer, family))
    # engram-peft leaves added tokens out of its map.
    added = family is not _Family.ENGRAM_PEFT
    common["token_map"] = recipes.compress_vocabulary(
        loaded, size=loaded.get_vocab_size(with_added_tokens=added)
    )
    common["pad_id"] = _padding_id(loaded) if pad_id is None else pad_id
    per_order = rows_per_head * len(orders) if len(rows_per_head) == 1 else rows_per_head
    if family is _Family.ENGRAM:
        return recipes.engram(rows_per_head=per_order, orders=orders, **common, **seeded)
    if family is _Family.ENGRAM_PEFT:
        all_heads = [rows * heads for rows in per_order]
        return recipes.engram_peft(rows_per_order=all_heads, orders=orders, **common, **seeded)
    _refuse(family, seed=seed)
    # Compared by their number: the last order may be any number that was typed.
    if orders != list(range(2, len(orders) + 2)):
        raise typer.BadParameter(f"{family} takes 2,3,... without gaps", param_hint="--orders")
    rows = _single(rows_per_head, family)
    return recipes.deepseek_v41(rows_per_head=rows, max_order=orders[-1], **common)


def _needed(option: str, value: Any, family: _Family) -> Any:
    if value is None:
        raise typer.BadParameter(f"is needed for the recipe {family}", param_hint=option)
    return value


def _refuse(family: _Family, **values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"has no meaning for the recipe {family}", param_hint=option)


def _single(rows_per_head: list[int], family: _Family) -> int:
    if len(rows_per_head) != 1:
        raise typer.BadParameter(
            f"{family} takes one number for all orders", param_hint="--rows-per-head"
        )
    return rows_per_head[0]


def _load_tokenizer(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    # The bindings raise Exception itself, and for some files a panic, which is no Exception.
    except BaseException as error:
        raise typer.BadParameter(
            f"{path} cannot be read as a tokenizer.json: {error}", param_hint="--tokenizer"
        ) from error


def _padding_id(tokenizer: "Tokenizer") -> int:
    """The padding token that a tokenizer.json names, by its settings or by its only 'pad'."""
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    added = tokenizer.get_added_tokens_decoder()
    named = [number for number, token in added.items() if "pad" in token.content.lower()]
    if len(named) != 1:
        raise typer.BadParameter(
            "the tokenizer does not tell its padding token; give the model's pad id",
            param_hint="--pad-id",
        )
    typer.echo(f"Padding id {named[0]} ({added[named[0]].content!r} of the tokenizer)")
    return int(named[0])
