"""Memories on a model hub, through huggingface_hub."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_store.errors import ConfigError
from engram_store_client.saving import Tables, save_memory

if TYPE_CHECKING:
    from engram_store_client.memory import Memory


def push_to_hub(
    memory: "Memory",
    repo_id: str,
    *,
    tables: Tables = "reference",
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    store_directory: Path | str | None = None,
    working_directory: Path | str | None = None,
) -> str:
    """Publish a memory as a model repository; made if it is not there.

    Args:
        memory: an attached one.
        repo_id: 'user/name'.
        tables: as for `Memory.save_pretrained`; 'export' uploads the tables too.
        private: of a repository that is made; None: the hub's own choice.
        revision: branch; made if it is not there. None: the main one.
        commit_message: None: says the step.
        token: as huggingface_hub takes it.
        store_directory: as for `Memory.save_pretrained`.
        working_directory: where the files are gathered before they are sent; on the file system of
            the store, exported tables take no space there. None: the system's.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: huggingface_hub is not installed, or what `Memory.save_pretrained` raises.
        What huggingface_hub raises; nothing is left in the working directory.
    """
    hub = _hub()
    memory.finish_commit()
    with tempfile.TemporaryDirectory(prefix="engram-hub-", dir=working_directory) as folder:
        # Paths of this machine are nobody's business.
        save_memory(
            memory,
            Path(folder),
            tables=tables,
            store_directory=store_directory,
            tell_location=False,
        )
        api = hub.HfApi(token=token)
        created = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(created.repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            repo_type="model",
            revision=revision,
            commit_message=commit_message or f"Engram memory {memory.name}, step {memory.step}",
        )
    return str(done)


def fetch(repo_id: str, *, revision: str | None, local_dir: Path | str | None) -> Path:
    """Download a repository and return its directory.

    Args:
        repo_id: 'user/name'.
        revision: branch, tag or commit.
        local_dir: where files go; None: the hub's cache, whose files must not be changed.

    Raises: ConfigError: huggingface_hub is not installed. What huggingface_hub raises.
    """
    return Path(_hub().snapshot_download(repo_id, revision=revision, local_dir=local_dir))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            "memories on a hub need huggingface_hub: pip install 'engram-store[hf]'"
        ) from error
    return huggingface_hub
