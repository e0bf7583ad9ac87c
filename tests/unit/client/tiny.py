"""Tiny random models, and a store in memory for them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from engram_store.optimizers.reference import narrow
from engram_store.recipes import engram
from engram_store.testing import MemorySession
from engram_store.types import OptimizerKind, RowDtype, TableSpec
from engram_store_client import Memory, attach

Tables: TypeAlias = dict[int, NDArray[Any]]
"""Rows by layer."""
VOCABULARY, LAYERS, DIM = 50, (0, 2), 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama() -> nn.Module:
    """Three random layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen3() -> nn.Module:
    """The same, with norms in its attention."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))


def make_session(
    dtype: RowDtype = RowDtype.FLOAT32, optimizer: OptimizerKind = OptimizerKind.SGD
) -> MemorySession:
    """Two tables with random rows; sgd makes a gradient visible as a difference of rows."""
    recipe = engram(
        token_map=np.arange(VOCABULARY), layers=LAYERS, rows_per_head=31, heads=2, pad_id=0
    )
    tables = {
        n: TableSpec(layer=n, rows=recipe.layer(n).rows, dim=DIM, dtype=dtype, optimizer=optimizer)
        for n in LAYERS
    }
    rng = np.random.default_rng(7)
    rows = {
        n: narrow(rng.standard_normal((spec.rows, DIM), np.float32), dtype)
        for n, spec in tables.items()
    }
    return MemorySession(recipe, tables, rows)


def make_tokens(batch: int = 2, time: int = 9, seed: int = 3) -> Tensor:
    """Random ids, never the pad."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, time), generator=generator)


def scramble(memory: Memory, seed: int = 5) -> None:
    """Random weights in all gates, so that nothing is zero by initialisation."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.gates.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)


def contents(session: MemorySession) -> Tables:
    """A copy of all rows."""
    return {layer: table.rows.copy() for layer, table in session.contents.items()}


def same_tables(session: MemorySession, before: Tables) -> bool:
    """Whether no bit changed since `before`."""
    return all(np.array_equal(session.contents[n].rows, rows) for n, rows in before.items())


def loss_of(model: nn.Module, tokens: Tensor) -> Any:
    """Next-token loss."""
    return model(input_ids=tokens, labels=tokens).loss


def loss_of_batch(model: nn.Module, batch: Any) -> Any:
    """Of a batch from a loader."""
    return model(**batch, labels=batch["input_ids"]).loss


def trained(
    run: Callable[[nn.Module, Memory], None], *, change: Callable[[nn.Module], None] | None = None
) -> Tables:
    """Tables after one step of a llama that learns by `run`."""
    model, session = llama(), make_session()
    if change is not None:
        change(model)
    memory = attach(model, session)
    scramble(memory)
    model.train()
    run(model, memory)
    memory.commit(0, lr=1.0)
    return contents(session)


def assert_same(ours: Tables, theirs: Tables) -> None:
    """Equal but for the order of sums."""
    for number in LAYERS:
        np.testing.assert_allclose(ours[number], theirs[number], atol=1e-6)


def one_batch(model: nn.Module, _memory: Memory) -> None:
    """One window."""
    loss_of(model, make_tokens()).backward()
