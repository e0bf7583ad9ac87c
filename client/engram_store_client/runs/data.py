"""Text into sequences of token ids."""

import glob
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from engram_store.errors import ConfigError
from engram_store_client.runs.settings import DataSettings

_TEXTS_AT_ONCE = 256
IGNORED = -100
"""Label of a position that the loss leaves out."""


class Packed(Dataset[dict[str, Tensor]]):
    """Sequences of equal length.

    Args:
        sequences: int32 [sequences, time].
    """

    def __init__(self, sequences: NDArray[np.int32]) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self._sequences[index].astype(np.int64))}


class Lines(Dataset[dict[str, Any]]):
    """One text for each sequence, of any length up to a limit."""

    def __init__(self, texts: list[NDArray[np.int32]]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._texts[index].tolist()}


def collate_packed(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of sequences of equal length: every token is also a label."""
    ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids, "labels": ids.clone()}


class PaddedLines:
    """Makes batches of texts of different lengths, padded on the right.

    Args:
        pad_id: fills up; its labels are ignored, and so is nothing else.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns: input_ids, labels and attention_mask, int64 [batch, longest]."""
        texts = [torch.tensor(item["input_ids"]) for item in items]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(texts, batch_first=True, padding_value=self._pad_id)
        labels = pad(texts, batch_first=True, padding_value=IGNORED)
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels != IGNORED).long()}


def load_dataset(
    sources: Sequence[str], settings: DataSettings, tokenizer: Any
) -> "Packed | Lines":
    """Tokenize files; all ids are held in memory, 4 bytes each.

    Args:
        sources: `data.train` or `data.validation`.
        settings: how.
        tokenizer: of transformers; its end-of-text id is put behind each text.

    Raises:
        ConfigError: no file, a file of another kind, or too little text.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("the tokenizer has no eos_token, which is put between texts; set one")
    texts = _encoded(read_texts(sources, settings.field), tokenizer, end)
    if not settings.packing:
        return Lines([ids[: settings.time] for ids in texts])
    stream = np.concatenate([np.empty(0, np.int32), *texts])
    count = len(stream) // settings.time
    if not count:
        raise ConfigError(
            f"{', '.join(sources)} has {len(stream):,} tokens, less than one sequence of "
            f"{settings.time:,}; give more text, or a smaller data.time"
        )
    return Packed(stream[: count * settings.time].reshape(count, settings.time))


def _encoded(texts: Iterable[str], tokenizer: Any, end: int) -> Iterator[NDArray[np.int32]]:
    """Ids of each text and the end, in batches, which tokenizers do on all cores."""
    left = iter(texts)
    while batch := list(itertools.islice(left, _TEXTS_AT_ONCE)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield np.array([*ids, end], np.int32)


def read_texts(sources: Sequence[str], field: str) -> Iterator[str]:
    """Every text of files, patterns and dataset directories, in order. Raises: ConfigError."""
    for source in sources:
        found = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - absolute patterns too
        if not found:
            raise ConfigError(f"there is no {source}; name a file, a pattern or a dataset")
        for name in found:
            path = Path(name)
            if path.is_dir():
                if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                    yield from _dataset(path, field)
                elif name == source:
                    raise ConfigError(
                        f"{source} is a directory without a dataset; for files in it give a "
                        f"pattern such as {source}/**/*.txt"
                    )
            else:
                yield from _file(path, field)


def _file(path: Path, field: str) -> Iterator[str]:
    """Raises: ConfigError."""
    if path.suffix not in (".txt", ".md", ".jsonl"):
        raise ConfigError(f"{path} is neither .txt, .md nor .jsonl")
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(json.loads(line), field, f"{path}, line {number}")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read {path}: {error}") from error


def _dataset(path: Path, field: str) -> Iterator[str]:
    """Texts of `datasets.save_to_disk`. Raises: ConfigError."""
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise ConfigError(f"{path} is a dataset: pip install datasets") from error
    loaded = load_from_disk(str(path))
    if isinstance(loaded, DatasetDict):
        splits = ", ".join(f"{path}/{name}" for name in loaded)
        raise ConfigError(f"{path} holds several datasets; name one of {splits}")
    for number, row in enumerate(loaded):
        yield _text_of(row, field, f"{path}, row {number}")


def _text_of(row: Any, field: str, where: str) -> str:
    """Raises: ConfigError."""
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(f"{where} has no text {field!r}; it has {has}. Set data.field")
    return text
