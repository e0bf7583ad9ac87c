"""Checks of vocabulary compression."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engram_store.conformance.comparison import Comparison, Subject
from engram_store.recipes import compress_vocabulary
from engram_store.recipes.compression import normalizer, text_key


def check_normalizer(path: Path) -> Iterator[Comparison]:
    """Normal form and key of each text (kind "normalizer")."""
    chain = normalizer()
    for number, case in enumerate(json.loads(path.read_text("utf-8"))["cases"]):
        subject = Subject("normalizer", path.name, f"case {number}")
        yield subject.exact("normalized", chain.normalize_str(case["text"]), case["normalized"])
        yield subject.exact("key", text_key(case["text"]), case["key"])


def check_lookup_table(
    subject: Subject, directory: Path, config: Mapping[str, Any]
) -> Iterator[Comparison]:
    """The token map of one configuration, against the tokenizer file that it names."""
    from tokenizers import Tokenizer

    path = directory / f"tokenizer_{config['config']['tokenizer']}.json"
    tokenizer = Tokenizer.from_file(str(path))
    table = compress_vocabulary(tokenizer, size=len(config["lookup_table"]))
    yield subject.exact("lookup_table", table, config["lookup_table"])
    yield subject.exact(
        "compressed_vocab_size", int(table.max()) + 1, config["compressed_vocab_size"]
    )
    for key, with_added in (("tokenizer_len", True), ("tokenizer_vocab_size", False)):
        if key in config:
            size = tokenizer.get_vocab_size(with_added_tokens=with_added)
            yield subject.exact(key, size, config[key])
