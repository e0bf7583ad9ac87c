"""Checks of the recipes: their numbers, and the rows of given tokens."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from engram_store.conformance.comparison import Comparison, Subject
from engram_store.conformance.vocabulary import check_lookup_table
from engram_store.recipes import Recipe, deepseek_v41, engram, engram_peft, qwen_ple
from engram_store.types import RowIds, TokenIds

_CUTS = (5, 6)
"""Where a sequence is cut to hash it in pieces: 5, 1, and the other tokens."""


def check_engram(path: Path) -> Iterator[Comparison]:
    """Vectors of the official demo (kind "recipe_a")."""
    for subject, config in _configurations("recipe_a", path):
        settings = config["config"]
        recipe = engram(
            token_map=config["lookup_table"],
            layers=settings["layer_ids"],
            rows_per_head=settings["engram_vocab_size"],
            orders=range(2, settings["max_ngram_size"] + 1),
            heads=settings["n_head_per_ngram"],
            pad_id=settings["pad_id"],
            seed=settings["seed"],
        )
        yield from check_lookup_table(subject, path.parent, config)
        yield from check_numbers(subject, recipe, config)
        yield from _check_cases(subject, recipe, config)


def check_peft(path: Path) -> Iterator[Comparison]:
    """Vectors of engram-peft (kind "recipe_p")."""
    for subject, config in _configurations("recipe_p", path):
        settings = config["config"]
        build = partial(
            engram_peft,
            token_map=config["lookup_table"],
            rows_per_order=settings["engram_vocab_size_per_ngram"],
            orders=settings["ngram_sizes"],
            heads=settings["n_head_per_ngram"],
            pad_id=settings["pad_id"],
            seed=settings["seed"],
        )
        recipe = build(layers=settings["target_layers"])
        yield from check_lookup_table(subject, path.parent, config)
        yield from check_numbers(subject, recipe, config)
        for layer, primes in _by_layer(config["primes_if_layer_hashed_alone"]):
            alone = build(layers=[layer]).layer(layer)
            yield subject.exact(f"layer {layer} hashed alone, primes", alone.moduli, primes)
        yield from _check_cases(subject, recipe, config)


def check_deepseek(path: Path) -> Iterator[Comparison]:
    """Vectors of DeepSeek-V4.1 (kind "recipe_b")."""
    for subject, config in _configurations("recipe_b", path):
        recipe = deepseek_recipe(config["config"], config["lookup_table"])
        yield from check_lookup_table(subject, path.parent, config)
        yield from check_numbers(subject, recipe, config)
        yield from _check_cases(subject, recipe, config)


def check_qwen(path: Path) -> Iterator[Comparison]:
    """Vectors of Qwen3.8-PLE (kind "recipe_c")."""
    for subject, config in _configurations("recipe_c", path):
        settings = config["config"]
        recipe = qwen_recipe(settings, config["eos_used"])
        order = [layer.layer for layer in recipe.layers]
        for number, expected in _by_layer(config["layers"]):
            part = subject.part(f"layer {number}")
            index = expected["ple_layer_index"]
            yield part.exact("ple_layer_index", order.index(number), index)
            yield from check_qwen_numbers(part, recipe, number, settings, expected)
            tokens = np.array(config["input_ids"], np.int64)
            yield from _check_rows(part, recipe, number, tokens, expected["table_rows"])


def deepseek_recipe(settings: Mapping[str, Any], token_map: ArrayLike) -> Recipe:
    """The recipe of a DeepSeek-V4.1 configuration."""
    return deepseek_v41(
        token_map=token_map,
        layers=settings["engram_layer_ids"],
        rows_per_head=settings["engram_vocab_size"],
        max_order=settings["engram_max_ngram_size"],
        heads=settings["engram_n_heads"],
        pad_id=settings["engram_pad_token_id"],
        image_token_id=settings.get("image_token_id"),
    )


def qwen_recipe(settings: Mapping[str, Any], eos_id: int) -> Recipe:
    """The recipe of a Qwen3.8-PLE configuration."""
    return qwen_ple(
        vocabulary=settings["vocab_size"],
        layers=settings["ple_layer_ids"],
        rows_per_head=settings["ngram_vocab_size_base"],
        orders=range(2, settings["ngram_size"] + 1),
        heads=settings["heads_per_ngram"],
        eos_id=eos_id,
        seed=settings["seed"],
        row_multiple=settings["make_ngram_vocab_size_divisible_by"],
    )


def check_numbers(
    subject: Subject, recipe: Recipe, expected: Mapping[str, Any]
) -> Iterator[Comparison]:
    """Filler, multipliers, moduli and offsets of a recipe that compresses."""
    yield subject.exact("compressed_pad_id", recipe.filler, expected["compressed_pad_id"])
    for layer in recipe.layers:
        number = str(layer.layer)
        part = subject.part(f"layer {number}")
        yield part.exact("multipliers", layer.multipliers, expected["multipliers"][number])
        yield part.exact("primes", layer.moduli, expected["primes"][number])
        yield part.exact("offsets", layer.offsets, expected["offsets"][number])
        if "total_rows" in expected:
            yield part.exact("total_rows", layer.rows, expected["total_rows"][number])


def check_qwen_numbers(
    subject: Subject,
    recipe: Recipe,
    number: int,
    settings: Mapping[str, Any],
    expected: Mapping[str, Any],
) -> Iterator[Comparison]:
    """Multipliers, moduli, offsets and sizes of one layer."""
    layer = recipe.layer(number)
    ours = {
        "multipliers": layer.multipliers,
        "head_vocab_sizes": list(chain.from_iterable(layer.moduli)),
        "head_offsets": layer.offsets,
        "total_rows": layer.rows,
        "padded_rows": layer.stored_rows,
        "row_dim": settings["ple_embed_dim"] // recipe.columns,
        "rows_per_shard": -(-layer.stored_rows // settings["split_ngram_parts"]),
    }
    for key, got in ours.items():
        if key in expected:
            yield subject.exact(key, got, expected[key])


def check_cases_of(
    subject: Subject, recipe: Recipe, cases: Sequence[Mapping[str, Any]], key: str
) -> Iterator[Comparison]:
    """Rows of cases whose tokens stand under `key`, one sequence or several."""
    for number, case in enumerate(cases):
        tokens = np.array(case[key], np.int64)
        if not {"table_rows", "head_indices"} & case.keys():
            raise KeyError(f"case {number} has neither table_rows nor head_indices")
        for layer, rows in _by_layer(case.get("table_rows", {})):
            part = subject.part(f"case {number}, layer {layer} table_rows")
            yield from _check_rows(part, recipe, layer, tokens, rows)
        for layer, indices in _by_layer(case.get("head_indices", {})):
            part = subject.part(f"case {number}, layer {layer} head_indices")
            rows = np.array(indices) + np.array(recipe.layer(layer).offsets)
            yield from _check_rows(part, recipe, layer, tokens, rows)


def _configurations(kind: str, path: Path) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """The configurations of a file, labelled."""
    for number, config in enumerate(json.loads(path.read_text("utf-8"))["configs"]):
        yield Subject(kind, path.name, f"config {number}"), config


def _by_layer(values: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """Values that JSON keyed by layer number."""
    for number, value in values.items():
        yield int(number), value


def _check_cases(
    subject: Subject, recipe: Recipe, config: Mapping[str, Any]
) -> Iterator[Comparison]:
    """Compressed ids and rows of each case of a recipe that compresses."""
    from engram_store.kernels.hashing import compress_ids

    token_map = np.array(config["lookup_table"], np.int32)
    for number, case in enumerate(config["cases"]):
        compressed = compress_ids(np.array(case["input_ids"], np.int64), token_map)
        part = subject.part(f"case {number}")
        yield part.exact("compressed_ids", compressed, case["compressed_ids"])
    yield from check_cases_of(subject, recipe, config["cases"], "input_ids")


def _check_rows(
    subject: Subject, recipe: Recipe, layer: int, tokens: TokenIds, expected: ArrayLike
) -> Iterator[Comparison]:
    """Rows in one pass, and in pieces that carry their context along."""
    batch = np.atleast_2d(tokens)
    wanted = np.reshape(expected, (*batch.shape, -1))
    yield subject.exact("rows", recipe.rows(layer, batch), wanted)
    if batch.shape[1] > _CUTS[-1]:
        yield subject.exact("rows in pieces", _rows_in_pieces(recipe, layer, batch), wanted)


def _rows_in_pieces(recipe: Recipe, layer: int, tokens: TokenIds) -> RowIds:
    """Rows of `tokens` [batch, time], hashed piece by piece."""
    context = None
    pieces = []
    for start, end in pairwise((0, *_CUTS, tokens.shape[1])):
        piece = tokens[:, start:end]
        pieces.append(recipe.rows(layer, piece, context=context))
        context = recipe.carry(piece, context)
    return np.concatenate(pieces, axis=1)
