"""Saving a memory into a directory and attaching it from there, with its tables or without."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import engram_store
from engram_store.errors import (
    ConfigError,
    FingerprintMismatchError,
    ReadOnlyError,
    SnapshotMismatchError,
    StoreClosedError,
    StoreLockedError,
    StoreNotFoundError,
)
from engram_store.recipes import engram
from engram_store_client import Memory, attach, connect, from_pretrained, memories
from tests.servers import serving
from tests.unit.client.models import logits, shape_of
from tests.unit.client.tiny import (
    LAYERS,
    VOCABULARY,
    llama,
    loss_of,
    make_session,
    make_tokens,
    qwen3,
    scramble,
)


def make_store(path: Path, *, rows_per_head: int = 31) -> Path:
    recipe = engram(
        token_map=np.arange(VOCABULARY),
        layers=LAYERS,
        rows_per_head=rows_per_head,
        heads=2,
        pad_id=0,
    )
    engram_store.create(path, recipe, dim=4, initial=engram_store.Normal(std=0.5, seed=1))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store `store` that was trained, and what was saved: `ref`, `whole`, and later steps."""
    root = tmp_path_factory.mktemp("saved")
    model = llama()
    with connect(make_store(root / "store")) as session:
        memory = attach(model, session, bias=True, name="prose")
        scramble(memory)
        train(model, memory)
        memory.save_pretrained(root / "ref")
        memory.save_pretrained(root / "whole", tables="export")
        torch.save(logits(model, make_tokens()), root / "logits.pt")
        train(model, memory)
        train(model, memory)
        session.snapshot()
    return root


def train(model: nn.Module, memory: Memory) -> None:
    model.train()
    loss_of(model, make_tokens()).backward()
    memory.commit(memory.step, lr=0.5)


def expected(saved: Path) -> Tensor:
    found: Tensor = torch.load(saved / "logits.pt")
    return found


@pytest.mark.parametrize("folder", ["ref", "whole"])
def test_what_was_saved_is_attached_as_it_was(saved: Path, folder: str) -> None:
    """Rows of that step, whatever the store did since; the session goes with the memory."""
    model = llama()

    memory = from_pretrained(model, saved / folder)

    assert memories(model) == {"prose": memory}
    assert memory.step == 1
    assert all(config.bias for config in memory.gate_configs.values())
    assert torch.equal(logits(model, make_tokens()), expected(saved))
    with pytest.raises(ReadOnlyError):
        loss_of(model.train(), make_tokens())
    memory.detach()
    with pytest.raises(StoreClosedError):
        memory.session.announce(make_tokens().numpy())


def test_exported_tables_can_be_trained_where_they_are(saved: Path, tmp_path: Path) -> None:
    """And saved into the same directory again: no second copy of the tables."""
    folder = tmp_path / "mine"
    shutil.copytree(saved / "whole", folder)
    (tables,) = folder.glob("tables-*")
    model = llama()
    memory = from_pretrained(model, str(folder), access="train", name="mine", mode="full")

    train(model, memory)
    with pytest.raises(ConfigError, match="checkpoint of memory 'prose', this is 'mine'"):
        memory.save_pretrained(folder, tables="export")
    memory.detach()
    memory = from_pretrained(model, folder, access="train")
    train(model, memory)
    memory.save_pretrained(folder, tables="export")
    memory.detach()

    assert list(folder.glob("tables-*")) == [tables]
    again = from_pretrained(llama(), folder)
    assert again.step == 2
    again.detach()


def test_saving_again_replaces_the_tables_that_went_along(saved: Path, tmp_path: Path) -> None:
    """One exported store stays; its files are those of the source, where links are possible."""
    model = llama()
    with connect(make_store(tmp_path / "store")) as session:
        memory = attach(model, session)
        scramble(memory)
        for _ in range(2):
            train(model, memory)
            memory.save_pretrained(tmp_path / "out", tables="export")
            memory.save_pretrained(tmp_path / "out", tables="export")  # the same step again

    names = {path.name.split("-")[0] for path in (tmp_path / "out").iterdir()}
    (tables,) = (tmp_path / "out").glob("tables-*")
    assert tables.name.startswith("tables-000000002-")
    assert names == {"README.md", "engram_config.json", "engram_dense.safetensors", "tables"}
    assert engram_store.inspect(tables).step == 2


def test_a_given_session_goes_back_to_the_snapshot(saved: Path, tmp_path: Path) -> None:
    """A store that is trained, or one that was exported; a session that reads must be there."""
    shutil.copytree(saved / "store", tmp_path / "store")
    with connect(tmp_path / "store") as session:
        assert session.step == 3
        model = llama()
        memory = from_pretrained(model, saved / "ref", session)
        assert session.step == memory.step == 1
        assert torch.equal(logits(model, make_tokens()), expected(saved))
        memory.detach()
        assert session.announce(make_tokens().numpy()) is not None
    (tables,) = (saved / "whole").glob("tables-*")
    with connect(tables, "read") as session:
        model = llama()
        from_pretrained(model, saved / "ref", session)
        assert torch.equal(logits(model, make_tokens()), expected(saved))
    shape = shape_of(llama())
    with connect(saved / "store", "read") as session:
        model = llama()
        with pytest.raises(SnapshotMismatchError, match="without its snapshot"):
            from_pretrained(model, saved / "ref", session)
        assert shape_of(model) == shape


def test_a_checkpoint_without_its_snapshot_is_one_clear_error(saved: Path, tmp_path: Path) -> None:
    """The store is gone, the exported tables are, or nobody knows where they were."""
    for folder in ("ref", "whole"):
        shutil.copytree(saved / folder, tmp_path / folder)
    for tables in (tmp_path / "whole").glob("tables-*"):
        shutil.rmtree(tables)
    moved = saved / "moved"
    (saved / "store").rename(moved)
    model = llama()
    shape = shape_of(model)
    try:
        for folder in ("ref", "whole"):
            with pytest.raises(SnapshotMismatchError, match=r"without its snapshot.*session="):
                from_pretrained(model, tmp_path / folder)
    finally:
        moved.rename(saved / "store")
    memory = attach(model, make_session())
    memory.save_pretrained(tmp_path / "nowhere")
    memory.detach()
    with pytest.raises(SnapshotMismatchError, match="nothing about where its store is"):
        from_pretrained(model, tmp_path / "nowhere")

    assert shape_of(model) == shape


def test_what_does_not_fit_is_refused_and_leaves_model_and_store_alone(
    saved: Path, tmp_path: Path
) -> None:
    """Another recipe, another model, a name that is taken, a mode or access that is none."""
    model = llama()
    with connect(make_store(tmp_path / "other", rows_per_head=37)) as other:
        with pytest.raises(FingerprintMismatchError, match="moduli"):
            from_pretrained(model, saved / "ref", other)
        assert other.step == 0
    wide = llama()
    wide.config.hidden_size = 64  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="32 values, this model's have 64"):
        from_pretrained(wide, saved / "ref")
    with pytest.raises(ConfigError, match="access"):
        from_pretrained(model, saved / "ref", access="write")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown mode"):
        from_pretrained(model, saved / "ref", mode="all")
    with pytest.raises(StoreNotFoundError, match="save_pretrained"):
        from_pretrained(model, tmp_path / "nothing")
    assert memories(model) == {}

    shutil.copytree(saved / "store", tmp_path / "store")
    attach(model, make_session(), name="prose")
    shape = shape_of(model)
    with connect(tmp_path / "store") as session:
        with pytest.raises(ConfigError, match="already"):
            from_pretrained(model, saved / "ref", session)
        assert session.step == 3
    with pytest.raises(ConfigError, match="already"):
        from_pretrained(model, saved / "whole")  # whose store is closed again
    assert shape_of(model) == shape
    from_pretrained(qwen3(), saved / "whole", access="train").detach()


def test_a_store_that_somebody_trains_is_not_opened_for_training(saved: Path) -> None:
    """Reading beside them is fine."""
    with connect(saved / "store"):
        with pytest.raises(StoreLockedError):
            from_pretrained(llama(), saved / "ref", access="train")
        from_pretrained(llama(), saved / "ref").detach()


def test_the_description_names_recipe_fingerprint_and_library(saved: Path) -> None:
    """For people and hubs; the card is theirs once they changed it."""
    told = json.loads((saved / "whole" / "engram_config.json").read_text())
    (tables,) = (saved / "whole").glob("tables-*")
    card = (saved / "whole" / "README.md").read_text()
    with engram_store.open(tables) as store:
        assert told["fingerprint"] == store.metadata.fingerprint
        assert told["recipe"] == json.loads(json.dumps(store.metadata.fingerprint_fields()))
    assert told["library_name"] == "engram-store"
    assert told["tables"]["exported"] == tables.name
    assert told["name"] == "prose"
    assert card.startswith("---\nlibrary_name: engram-store\n")
    assert told["fingerprint"] in card
    assert "base_model" not in card  # a random model has no name


def test_a_card_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """peft writes one too."""
    memory = attach(llama(), make_session())
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\nmine\n")

    memory.save_pretrained(tmp_path)

    assert (tmp_path / "README.md").read_text().endswith("mine\n")


def test_exporting_from_a_store_process_needs_its_directory(saved: Path, tmp_path: Path) -> None:
    """Refused before a snapshot is taken, with what to do; done where the files can be read."""
    make_store(tmp_path / "store")
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "engram-store export"),
        ({"store_directory": saved / "store"}, "store_directory names"),
        ({"tables": "none"}, "'reference' or 'export'"),
    ]
    model, out = llama(), tmp_path / "out"
    with (
        engram_store.open(tmp_path / "store", "train") as store,
        serving(store, "tcp:") as address,
        connect(address) as session,
    ):
        memory = attach(model, session)
        scramble(memory)
        train(model, memory)
        for options, match in refused:
            with pytest.raises(ConfigError, match=match):
                memory.save_pretrained(out, **{"tables": "export", **options})
        assert store.durable_step == 0
        assert not out.exists()

        memory.save_pretrained(out, tables="export", store_directory=tmp_path / "store")
        expected = logits(model, make_tokens())
        memory.detach()
        from_pretrained(model, out, session)
        assert torch.equal(logits(model, make_tokens()), expected)

    other = llama()
    from_pretrained(other, out)
    assert torch.equal(logits(other, make_tokens()), expected)
