"""A stream of real text: the sources of Python's standard library and the system's documentation.

What matters is how often n-grams repeat, because it decides how many rows a step has; random
tokens would have almost no repeats.
"""

import gzip
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram_store.recipes.compression import text_key

SEGMENT = 2048
"""Tokens of one document piece."""
_DOCUMENTATION = Path("/usr/share/doc")
_FILE_BYTES = 1 << 16
"""Of one file at most: few long files would repeat themselves more than a corpus does."""
_TOKEN = re.compile(
    r"\ ?[^\W\d_]{1,8}"  # up to eight letters with the space before: about a subword
    r"|\d{1,3}"
    r"|\n[ \t]*"  # a line's end with the next one's indent
    r"|[^\w\s]{1,2}"
    r"|.",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Text:
    """Tokenized text."""

    tokens: NDArray[np.int64]
    """[segments, at most SEGMENT]"""
    token_map: NDArray[np.int32]
    """Compressed id of each id."""


def read_text(count: int, segment: int) -> Text:
    """`count` tokens in segments, half of them code where there is documentation too."""
    vocabulary: dict[str, int] = {}
    ids: list[int] = []
    sources = [_python_files(), _documentation_files()]
    for number, files in enumerate(sources, start=1):
        wanted = count * number // len(sources) - len(ids)
        words = chain.from_iterable(_TOKEN.findall(_read(path)) for path in files)
        ids += [vocabulary.setdefault(word, len(vocabulary)) for word in islice(words, wanted)]
    if len(ids) < count:
        # No documentation here, or less text than asked for: repeat what there is.
        ids = list(islice(chain.from_iterable(iter(lambda: ids, None)), count))
    tokens = np.array(ids, np.int64).reshape(-1, segment)
    compressed: dict[str, int] = {}
    token_map = [compressed.setdefault(text_key(word), len(compressed)) for word in vocabulary]
    return Text(np.random.default_rng(0).permutation(tokens), np.array(token_map, np.int32))


def _python_files() -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return _shuffled(p for p in library.rglob("*.py") if "site-packages" not in p.parts)


def _documentation_files() -> list[Path]:
    binary = {".png", ".svg", ".pdf", ".jpg"}
    found = (p for p in _DOCUMENTATION.rglob("*") if p.suffix not in binary)
    return _shuffled(p for p in found if p.is_file())


def _shuffled(files: Iterator[Path]) -> list[Path]:
    ordered = sorted(files)
    random.Random(0).shuffle(ordered)
    return ordered


def _read(path: Path) -> str:
    """The start of a text file; nothing if it is none."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(_FILE_BYTES).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return ""
