"""Publishing memories. Nothing here reaches a hub: `FakeApi` stands for huggingface_hub's."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engram_store.errors import ConfigError
from engram_store_client import attach, connect, from_pretrained
from tests.unit.client.models import logits
from tests.unit.client.test_saving import make_store, train
from tests.unit.client.tiny import llama, make_session, make_tokens, scramble

TOKEN = "hf_of_nobody"  # noqa: S105 - of nobody


class FakeApi:
    """Keeps what it is asked to upload. A fake: the real one needs a network."""

    def __init__(self, hub: Path, token: str | None) -> None:
        self.hub, self.calls = hub, list[tuple[str, dict[str, Any]]]()
        self.token = token

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
        self.calls.append(("upload_folder", {"repo_id": repo_id, **options}))
        for path in Path(folder_path).rglob("*"):
            if path.is_file():  # a hub keeps no empty directories
                target = self.hub / repo_id / path.relative_to(folder_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        return f"https://hub.example/{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[FakeApi]:
    """The fakes that were made, in place of huggingface_hub's upload and download."""
    import huggingface_hub

    made: list[FakeApi] = []

    def make_api(token: str | None = None) -> FakeApi:
        made.append(FakeApi(tmp_path / "hub", token))
        return made[-1]

    def download(repo_id: str, *, revision: str | None, local_dir: Any) -> str:
        source = tmp_path / "hub" / repo_id
        if local_dir is not None:
            shutil.copytree(source, local_dir)
            return str(local_dir)
        cache = tmp_path / "cache"  # links to files that must not be changed, as the real one has
        for path in source.rglob("*"):
            if path.is_file():
                link = cache / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "HfApi", make_api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return made


def test_a_repository_holds_what_from_pretrained_needs(tmp_path: Path, hub: list[FakeApi]) -> None:
    """Tables too, without a path of this machine; they can be read from the cache."""
    model: nn.Module = llama()
    with connect(make_store(tmp_path / "store")) as session:
        memory = attach(model, session)
        scramble(memory)
        train(model, memory)
        address = memory.push_to_hub(
            "me/memory", tables="export", private=True, revision="v1", token=TOKEN
        )
        expected = logits(model, make_tokens())

    (api,) = hub
    assert api.token == TOKEN
    assert [name for name, _ in api.calls] == ["create_repo", "create_branch", "upload_folder"]
    calls = dict(api.calls)
    assert calls["create_repo"] == {
        "repo_id": "me/memory",
        "repo_type": "model",
        "private": True,
        "exist_ok": True,
    }
    assert calls["create_branch"]["branch"] == calls["upload_folder"]["revision"] == "v1"
    assert "step 1" in calls["upload_folder"]["commit_message"]
    assert address.endswith("me/memory/commit/1")
    folder = tmp_path / "hub" / "me" / "memory"
    told = json.loads((folder / "engram_config.json").read_text())
    assert told["tables"]["location"] is None
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path

    for options in ({}, {"local_dir": tmp_path / "mine", "access": "train"}):
        other = llama()
        loaded = from_pretrained(other, "me/memory", revision="v1", **options)  # type: ignore[arg-type]
        assert torch.equal(logits(other, make_tokens()), expected)
        if options:
            train(other, loaded)
        loaded.detach()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    with pytest.raises(ConfigError, match="local_dir"):
        from_pretrained(llama(), "me/memory", access="train")


def test_a_reference_is_published_without_its_location(tmp_path: Path, hub: list[FakeApi]) -> None:
    """Whoever loads it needs a session of their own."""
    session = make_session()
    memory = attach(llama(), session)
    scramble(memory)

    memory.push_to_hub("me/reference", working_directory=tmp_path)

    folder = tmp_path / "hub" / "me" / "reference"
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "engram_config.json", "engram_dense.safetensors"}
    assert "session=engram.connect(STORE)" in (folder / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    model = llama()
    loaded = from_pretrained(model, "me/reference", session)
    for name, tensor in loaded.gates.state_dict().items():
        assert torch.equal(tensor, memory.gates.state_dict()[name])
