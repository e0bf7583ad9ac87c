"""Tiny Trainers with a memory, and the same model with its tables in the optimiser."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import engram_store
from engram_store.recipes import Recipe, engram
from engram_store.session import Session
from engram_store.store import Store
from engram_store_client import Memory, attach
from engram_store_client.gates import Gate
from engram_store_client.trainer import EngramCallback
from tests.unit.client.tiny import LAYERS, VOCABULARY, llama, scramble

DIM, TIME = 4, 9
torch.set_num_threads(1)  # several of them only wait for each other here
gc.freeze()  # every Trainer begins with a collection; it need not look at all that was imported


def recipe() -> Recipe:
    """Two layers of some 400 rows."""
    return engram(
        token_map=np.arange(VOCABULARY), layers=LAYERS, rows_per_head=101, heads=2, pad_id=0
    )


def make_store(path: Path, optimizer: str = "sgd", **settings: Any) -> Store:
    """A store with random rows, open for training."""
    settings["initial"] = engram_store.Normal(std=0.5, seed=3)
    engram_store.create(path, recipe(), dim=DIM, dtype="float32", optimizer=optimizer, **settings)
    return engram_store.open(path, "train")


def rows_of(store: Store, layer: int) -> NDArray[Any]:
    """All rows of a table."""
    return store.read_rows(layer, np.arange(store.tables[layer].rows, dtype=np.int32))


def tables_of(store: Store) -> dict[int, bytes]:
    """Every byte of all rows and states, by layer."""
    found = {}
    for layer, spec in store.tables.items():
        rows, state = store._engine.tables[layer].read_range(0, spec.rows)
        found[layer] = rows.tobytes() + state.tobytes()
    return found


class Texts(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Random texts, of one length or of several."""

    def __init__(self, count: int, *, seed: int = 1, lengths: tuple[int, int] = (TIME, TIME)):
        draw = np.random.default_rng(seed)
        sizes = draw.integers(lengths[0], lengths[1] + 1, count)
        self._texts = [draw.integers(1, VOCABULARY, size).tolist() for size in sizes]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self._texts[index], "labels": self._texts[index]}


class Stream(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    """The same without a length."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for index in range(len(self._texts)):
            yield self._texts[index]


def pad(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A collator without a tokenizer: it pads with 0."""
    longest = max(len(f["input_ids"]) for f in features)
    ids = torch.zeros(len(features), longest, dtype=torch.int64)
    for row, feature in zip(ids, features, strict=True):
        row[: len(feature["input_ids"])] = torch.tensor(feature["input_ids"])
    mask = (ids > 0).to(torch.int64)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    """Arguments that log every step and write nothing but checkpoints that are asked for."""
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 11,
        "num_train_epochs": 1,
    }
    return TrainingArguments(**settings | changes)


def attached(session: Session, model: nn.Module | None = None, **options: Any) -> Memory:
    """A memory whose gates are not zero anywhere."""
    memory = attach(llama() if model is None else model, session, **options)
    scramble(memory)
    return memory


def make_trainer(memory: Memory, args: TrainingArguments, **changes: Any) -> Trainer:
    """A Trainer of a memory's model, with its callback."""
    callbacks = [memory.callback(), *changes.pop("more_callbacks", [])]
    wanted = {
        "train_dataset": Texts(14),
        "data_collator": memory.collator(pad),
        "callbacks": callbacks,
    }
    return Trainer(model=memory.model, args=args, **(wanted | changes))  # type: ignore[arg-type]


def callback_of(trainer: Trainer) -> EngramCallback:
    """The one of the memory."""
    callbacks = trainer.callback_handler.callbacks
    return next(c for c in callbacks if isinstance(c, EngramCallback))


def series(trainer: Trainer, key: str) -> list[float]:
    """What was logged under a key, step after step."""
    return [log[key] for log in trainer.state.log_history if key in log and "loss" in log]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class InMemory(nn.Module):
    """A model with its tables as embeddings: what every optimiser and Trainer knows how to train.

    Args:
        model: the base.
        gates: by layer; the same arithmetic as the memory's.
        rows: of the tables at the beginning, by layer.
    """

    def __init__(
        self, model: nn.Module, gates: dict[int, Gate], rows: dict[int, NDArray[Any]]
    ) -> None:
        super().__init__()
        self.model, self.config, self.loss_type = model, model.config, model.loss_type
        self.gates = nn.ModuleDict({str(n): gate for n, gate in gates.items()})
        self.tables = nn.ModuleDict(
            {str(n): nn.Embedding(len(r), DIM, _weight=torch.tensor(r)) for n, r in rows.items()}
        )
        self._recipe, self._ids, self._mask = recipe(), torch.zeros(0), torch.zeros(0)
        for number in rows:
            layer = model.get_submodule(f"model.layers.{number}")
            layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **more: Any
    ) -> Any:
        self._ids, self._mask = input_ids, attention_mask
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)

    def _hook(self, number: int) -> Callable[..., Any]:
        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0]
            ids = torch.from_numpy(self._recipe.rows(number, self._ids.numpy()).astype(np.int64))
            gate = self.gates[str(number)]
            dtype = next(gate.parameters()).dtype
            rows = self.tables[str(number)](ids).to(dtype).flatten(-2)
            residual = gate(rows, hidden.to(dtype), mask=self._mask)
            return (hidden + residual.to(hidden.dtype), *args[1:]), kwargs

        return add
