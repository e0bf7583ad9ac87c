"""Checks against constants of released models."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engram_store.conformance.comparison import Comparison, Subject
from engram_store.conformance.hashing import (
    check_cases_of,
    check_numbers,
    check_qwen_numbers,
    deepseek_recipe,
    qwen_recipe,
)
from engram_store.recipes.primes import distinct_moduli
from engram_store.recipes.quantization import SCALE_BLOCK


def check_releases(path: Path) -> Iterator[Comparison]:
    """Constants of releases (kind "real_release"), each entry named after its recipe."""
    for name, release in json.loads(path.read_text("utf-8")).items():
        subject = Subject("real_release", path.name, name)
        if name.startswith("A_sizes"):
            for size, expected in release.items():
                yield from _check_sizes(subject.part(size), expected)
        elif name.startswith("B_"):
            yield from _check_deepseek(subject, release)
        elif name.startswith("C_"):
            yield from _check_qwen(subject, release)
        else:
            yield subject.exact("recipe", "unknown", "A_sizes, B_ or C_")


def _check_sizes(subject: Subject, expected: Mapping[str, Any]) -> Iterator[Comparison]:
    """Primes and row counts of the paper's models; layers and heads are told by the primes."""
    primes = expected["primes"]
    orders, heads = np.shape(next(iter(primes.values())))
    bases = [expected["engram_vocab_size"]] * orders
    moduli = distinct_moduli(bases, heads=heads, layers=len(primes))
    for layer, of_layer in zip(primes, moduli, strict=True):
        yield subject.exact(f"layer {layer} primes", of_layer, primes[layer])
        yield subject.exact(f"layer {layer} rows", np.sum(of_layer), expected["rows"][layer])


def _check_deepseek(subject: Subject, release: Mapping[str, Any]) -> Iterator[Comparison]:
    """All numbers of a DeepSeek release; its tokens are compressed already."""
    settings = release["config"]
    recipe = deepseek_recipe(settings, np.arange(settings["engram_compressed_vocab_size"]))
    sizes = [layer.rows for layer in recipe.layers]
    yield subject.exact("engram_num_embeddings", sizes, settings["engram_num_embeddings"])
    row_bytes = {
        "weight": settings["engram_head_dim"],
        "scale": settings["engram_head_dim"] // SCALE_BLOCK,
    }
    yield subject.exact("row_bytes", row_bytes, release["row_bytes"])
    yield from check_numbers(subject, recipe, release)
    yield from check_cases_of(subject, recipe, release["cases"], "compressed_ids")


def _check_qwen(subject: Subject, release: Mapping[str, Any]) -> Iterator[Comparison]:
    """All numbers of a Qwen release with one such layer."""
    settings = release["config"]
    recipe = qwen_recipe(settings, settings["eos_token_id"])
    for number in settings["ple_layer_ids"]:
        yield from check_qwen_numbers(subject, recipe, number, settings, release)
