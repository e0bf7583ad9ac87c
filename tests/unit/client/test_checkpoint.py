"""A trainer's checkpoint."""

import copy
import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engram_store.errors import (
    ConfigError,
    DiskFullError,
    ForeignFileError,
    SnapshotMismatchError,
    StoreNotFoundError,
    UnknownVersionError,
)
from engram_store_client import Memory, attach
from tests.unit.client.tiny import (
    contents,
    llama,
    loss_of,
    make_session,
    make_tokens,
    same_tables,
    scramble,
)


def train_a_step(model: nn.Module, memory: Memory, seed: int = 3) -> None:
    loss_of(model, make_tokens(seed=seed)).backward()
    memory.commit(memory.step, lr=1.0)


def test_a_checkpoint_brings_back_gates_tables_and_step(tmp_path: Path) -> None:
    """Training goes on from it as if nothing had happened since."""
    model, session = llama(), make_session()
    memory = attach(model, session)
    scramble(memory)
    train_a_step(model, memory)
    memory.save_pretrained(tmp_path)
    saved, tables = copy.deepcopy(memory.gates.state_dict()), contents(session)
    train_a_step(model, memory, seed=8)
    scramble(memory, seed=9)
    loss_of(model, make_tokens())  # a window that is open when the checkpoint comes back

    memory.load(tmp_path)

    assert same_tables(session, tables)
    assert memory.step == session.step == 1
    for name, tensor in memory.gates.state_dict().items():
        assert torch.equal(tensor, saved[name])
    train_a_step(model, memory, seed=8)
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md",
        "engram_config.json",
        "engram_dense.safetensors",
    }


def test_a_checkpoint_of_another_store_or_snapshot_is_refused_with_nothing_changed(
    tmp_path: Path,
) -> None:
    """Both sides are named."""
    model, session = llama(), make_session()
    memory = attach(model, session)
    memory.save_pretrained(tmp_path)
    scramble(memory)
    train_a_step(model, memory)
    gates, tables = copy.deepcopy(memory.gates.state_dict()), contents(session)

    session._snapshots.clear()
    with pytest.raises(SnapshotMismatchError):
        memory.load(tmp_path)
    session.store_id = "another"
    with pytest.raises(SnapshotMismatchError, match=r"'memory'.*'another'"):
        memory.load(tmp_path)

    assert same_tables(session, tables)
    assert session.step == 1
    assert all(torch.equal(gates[n], t) for n, t in memory.gates.state_dict().items())


def test_a_checkpoint_of_other_gates_or_none_is_refused(tmp_path: Path) -> None:
    """Before the store is asked for anything."""
    model, session = llama(), make_session()
    memory = attach(model, session, kernel_size=2)
    with pytest.raises(StoreNotFoundError, match="save_pretrained"):
        memory.load(tmp_path)
    memory.save_pretrained(tmp_path)
    memory.detach()

    memory = attach(model, session, kernel_size=2, identity_init=False)
    memory.load(tmp_path)
    memory.detach()
    memory = attach(model, session, kernel_size=3)
    with pytest.raises(ConfigError, match="was made for"):
        memory.load(tmp_path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """Neither another safetensors file nor a description that lacks something."""
    memory = attach(llama(), make_session())
    path = tmp_path / "engram_dense.safetensors"
    for metadata in ({}, {"engram_config": "{"}, {"engram_config": "{}"}):
        save_file({"x": torch.zeros(1)}, path, metadata)
        with pytest.raises(ForeignFileError):
            memory.load(tmp_path)
    fine = {"store_id": "ab" * 16, "step": 7, "digest": "cd" * 32}
    tables = {"exported": None, "location": None}
    described = {
        "version": 1,
        "name": "default",
        "step": 7,
        "store": fine,
        "tables": tables,
        "gates": {},
        "fingerprint": "",
        "recipe": {},
    }
    changes: tuple[dict[str, object], ...] = (
        {"step": "seven"},
        {"step": 7.0},
        {"gates": []},
        {"store": []},
        {"store": {**fine, "store_id": 5}},
        {"store": {**fine, "step": True}},
        {"store": {**fine, "digest": None}},
        {"name": None},
        {"tables": {"exported": None}},
        {"tables": {**tables, "exported": "../elsewhere"}},
        {"tables": {**tables, "exported": "/elsewhere"}},
        {"tables": {**tables, "location": 3}},
        {"gates": {"one": {"hidden_size": 1, "row_width": 1, "kind": "engram"}}},
        {"recipe": 5},
    )
    texts = [json.dumps({**described, **change}) for change in changes]
    for text in (*texts, "[" * 5_000, "[]"):
        save_file({"x": torch.zeros(1)}, path, {"engram_config": text})
        with pytest.raises(ForeignFileError, match="save_pretrained"):
            memory.load(tmp_path)
    save_file({"x": torch.zeros(1)}, path, {"engram_config": json.dumps(described)})
    with pytest.raises(ConfigError, match="was made for"):  # that one could be read
        memory.load(tmp_path)
    save_file({"x": torch.zeros(1)}, path, {"engram_config": '{"version": 2}'})
    with pytest.raises(UnknownVersionError, match="format 2"):
        memory.load(tmp_path)


def test_a_failed_save_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file gets its name only when it is complete."""
    model, session = llama(), make_session()
    memory = attach(model, session)
    memory.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    scramble(memory)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.fdatasync", fail)
    with pytest.raises(DiskFullError, match="stored before is intact"):
        memory.save_pretrained(tmp_path)

    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
