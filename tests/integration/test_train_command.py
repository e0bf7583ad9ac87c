"""`engram-store train`: from a file to trained tables, again after an end, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import load_file

import engram_store
from engram_store.cli import main
from examples.ingredients import save_toy
from tests.pairs import memtable_directory

# peft 0.21 asks for a name that transformers 5.23 calls deprecated; a CPU pins nothing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny models do nothing but wait for each other, on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Run:
    """One file in a directory of its own."""

    def __init__(self, directory: Path, toy: tuple[Path, Path]) -> None:
        self.directory, self.config = directory, directory / "run.yaml"
        self.store, self.output = directory / "my.engram", directory / "run"
        model, text = toy
        self.settings: dict[str, Any] = {
            "model": {"path": str(model), "random_weights": True, "dtype": "float32"},
            "store": {
                "path": str(self.store),
                "create": {"layers": [0, 1], "rows_per_head": 200, "heads": 2, "dim": 8},
                "options": {"memtable_dir": str(directory / "memtables")},
            },
            "data": {"train": [str(text)], "time": 32},
            "training": {
                "output_dir": str(self.output),
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_steps": 4,
                "save_steps": 2,
                "logging_steps": 2,
                "learning_rate": 1e-2,
                "use_cpu": True,
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
            },
        }

    def __call__(self, *arguments: str) -> int:
        self.config.write_text(yaml.safe_dump(self.settings))
        with pytest.raises(SystemExit) as end:
            main(["train", str(self.config), *arguments])
        return int(end.value.code or 0)

    def rows(self) -> dict[int, Any]:
        """All rows of the newest snapshot."""
        with engram_store.open(self.store) as store:
            return {
                layer: store.read_rows(layer, np.arange(spec.rows, dtype=np.int32))
                for layer, spec in store.tables.items()
            }


@pytest.fixture
def run(tmp_path: Path, toy: tuple[Path, Path]) -> Iterator[Run]:
    made = Run(tmp_path, toy)
    yield made
    if made.store.exists():
        store_id = engram_store.inspect(made.store).metadata.store_id
        shutil.rmtree(memtable_directory(made.store, store_id), ignore_errors=True)


def test_a_file_trains_and_goes_on_to_the_same_bits(
    run: Run, toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped at a checkpoint and started again: tables and gates as without the interruption."""
    assert run("--set", "training.lr_scheduler_type=constant") == 0
    told = capsys.readouterr().out
    assert told.index("It fits.") < told.index("Making")
    whole = run.rows()
    assert all(rows.any() for rows in whole.values())

    (tmp_path / "second").mkdir()
    again = Run(tmp_path / "second", toy)
    constant = ("--set", "training.lr_scheduler_type=constant")
    assert again(*constant, "--set", "training.max_steps=2") == 0
    capsys.readouterr()
    assert again(*constant) == 0
    assert "checkpoint-2" in capsys.readouterr().out
    for layer, rows in again.rows().items():
        np.testing.assert_array_equal(rows, whole[layer])
    dense = "engram_dense.safetensors"
    saved, twin = (load_file(one.output / "engram" / dense) for one in (run, again))
    assert saved.keys() == twin.keys()
    assert all(torch.equal(saved[name], twin[name]) for name in saved)


def test_lora_checkpointing_and_held_out_text(
    run: Run, toy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts of different lengths, from .jsonl; the control arm leaves its tables alone."""
    lines = [json.dumps({"body": text}) for text in toy[1].read_text().split("\n\n")[:40]]
    held_out = run.directory / "held.jsonl"
    held_out.write_text("\n".join(lines))
    run.settings["data"] |= {"validation": [str(held_out)], "train": [str(held_out)],
                             "field": "body", "packing": False}  # fmt: skip
    run.settings["lora"] = {"rank": 2}
    run.settings["training"] |= {"gradient_checkpointing": True, "max_steps": 1, "save_steps": 1}
    run.settings["memory"] = {"zero_table": True, "layers": [0]}

    assert run() == 0

    told = capsys.readouterr().out
    assert "LoRA rank 2" in told
    assert "gradient checkpointing" in told
    assert "Held out: loss" in told
    assert (run.output / "lora" / "adapter_model.safetensors").is_file()
    assert not any(rows.any() for rows in run.rows().values())


def test_check_prints_the_plan_and_makes_nothing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--check") == 0
    assert "It fits." in capsys.readouterr().out
    assert not run.store.exists()
    assert not run.output.exists()


def test_what_cannot_fit_is_refused_before_anything_is_made(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what would fit; `limits.enforce: false` is how to start all the same."""
    run.settings["limits"] = {"disk": "800kB"}
    assert run() == 2
    captured = capsys.readouterr()
    assert "cannot fit" in captured.err
    assert "What would fit" in captured.err
    assert not run.store.exists()
    assert run("--check", "--set", "limits.enforce=false") == 0
    assert "starts all the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.max_stps=3"], "did you mean max_steps"),
        (["training.save_steps=0.5", "training.eval_strategy=never"], "refused by transformers"),
        (["store.create=null"], "say in store.create what to make"),
        (["data.train=[/no/such/file.txt]"], "there is no /no/such/file.txt"),
        (["data.time=100000"], "less than one sequence"),
        (["model.tokenizer=/no/such"], "set model.tokenizer"),
        (["memory.layers=[7]"], "the store has tables for [0, 1]"),
        (["store.create.layers=[9]"], "the model has layers 0 to 2"),
        (["store.path=unix:///no/such.sock"], "store.create are for a directory"),
        (["resume=/no/such/checkpoint"], "no complete checkpoint"),
    ],
)
def test_bad_settings_end_with_one_sentence(
    run: Run, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, what was asked and what to do."""
    assert run(*(part for change in changes for part in ("--set", change))) == 2
    assert message in capsys.readouterr().err


def test_another_tokenizer_than_the_store_s_is_refused(
    run: Run, toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store that is there is used as it is, if its ids mean what the tokenizer's mean."""
    recipe = engram_store.recipes.engram(
        token_map=np.arange(400), layers=[0], rows_per_head=100, heads=2, pad_id=0
    )
    engram_store.create(run.store, recipe, dim=8)
    assert run() == 2
    assert "the tokenizer does not fit this store" in capsys.readouterr().err


def test_the_template_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    """And naming no file says how to get one."""
    with pytest.raises(SystemExit) as end:
        main(["train", "--template"])
    assert not end.value.code
    assert "training:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["train"])
    assert end.value.code == 2
    assert "--template" in capsys.readouterr().err
