"""Text of a run: which files are read, how it is cut, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engram_store.errors import ConfigError
from engram_store_client.runs.data import PaddedLines, collate_packed, load_dataset, read_texts
from engram_store_client.runs.settings import DataSettings

END = 0


class Letters:
    """A tokenizer: one id for each letter, from 1 on."""

    eos_token_id: int | None = END

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}


def settings(path: Path, **changes: Any) -> DataSettings:
    common: dict[str, Any] = {"train": (str(path),), "time": 3}
    return DataSettings(**common | changes)


def ids(dataset: Any) -> list[list[int]]:
    return [torch.as_tensor(dataset[i]["input_ids"]).tolist() for i in range(len(dataset))]


def test_packing_puts_texts_one_after_the_other(tmp_path: Path) -> None:
    """In the order of their names, an end behind each; what fills no sequence is left out."""
    (tmp_path / "b.txt").write_text("c")
    (tmp_path / "a.txt").write_text("ab")
    given = settings(tmp_path / "*.txt")

    packed = load_dataset(given.train, given, Letters())

    assert ids(packed) == [[1, 2, END]]  # [3, END] is no sequence
    batch = collate_packed([packed[0], packed[0]])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, END]] * 2


def test_without_packing_each_text_is_a_sequence(tmp_path: Path) -> None:
    """Cut at the limit, padded with ids that no label and no attention sees."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcde", "a")))
    given = settings(path, packing=False)

    lines = load_dataset(given.train, given, Letters())

    assert ids(lines) == [[1, 2, 3], [1, END]]
    batch = PaddedLines(9)([lines[0], lines[1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, END, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3], [1, END, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_directory_of_datasets_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"body": ["x", "y"]})
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "many"))

    assert list(read_texts([str(tmp_path / "one")], "body")) == ["x", "y"]
    with pytest.raises(ConfigError, match=r"name one of .*many/train"):
        list(read_texts([str(tmp_path / "many")], "body"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "neither .txt, .md nor .jsonl"),
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}', "line 2 has no text 'text'; it has body"),
        ("a.jsonl", "[1]", "line 1 has no text"),
        ("a.jsonl", "{", "cannot read"),
        ("a.txt", b"\xff\xfe", "cannot read"),
        ("folder/a.txt", "x", "give a pattern such as"),
        ("b.txt", "x", "there is no"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    asked = {"folder/a.txt": path.parent, "b.txt": tmp_path / "c.txt"}.get(name, path)
    with pytest.raises(ConfigError, match=message):
        list(read_texts([str(asked)], "text"))


def test_too_little_text_and_no_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab")
    with pytest.raises(ConfigError, match="less than one sequence of 30"):
        load_dataset([str(path)], settings(path, time=30), Letters())
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    with pytest.raises(ConfigError, match="eos_token"):
        load_dataset([str(path)], settings(path), tokenizer)
